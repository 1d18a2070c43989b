"""Identity checks: whether a layer gives the results of PyTorch's BatchNorm.

The comparison is one of behaviour. PyTorch's layer gets the gamma and beta that explain
the layer's output, so that no name of a parameter or buffer has to be known.
"""

from collections.abc import Iterator
from math import inf
from typing import Any

import torch
from torch import nn

from bn_lightning.norms.check import inputs, weights
from bn_lightning.norms.check.findings import Comparison, NotApplicable, batch_norm_identity
from bn_lightning.norms.check.subject import Case, Norm
from bn_lightning.norms.convert import TORCH

ROLES = ("weight", "bias")
# PyTorch's layer gets the scale and shift that explain the output in training.
SCRIPT = """
reference = TORCH_CLASS.to(x.dtype)
h, y = (m.train()(x).detach() for m in (reference, layer))
reference.weight.data = (h * y).mean(AXES) / h.square().mean(AXES)
reference.bias.data = y.mean(AXES)
"""
EVALUATION = (
    SCRIPT
    + """
with torch.no_grad():
    assert_close(layer.eval()(x), reference.eval()(x), rtol=1e-3, atol=1e-3)
"""
)
GRADIENTS = (
    SCRIPT
    + """
dx = [torch.autograd.grad(m.train(MODE)(x.requires_grad_()), x, h)[0] for m in (layer, reference)]
assert_close(*dx, rtol=1e-3, atol=1e-3)
"""
)


def cases(norm: Norm, *training: bool) -> Iterator[tuple[Case, nn.Module, nn.Module]]:
    """Yield cases, each with a layer and with PyTorch's layer in the same state.

    Both were trained with the same batches.
    """
    for case in norm.cases(training=training):
        if case.kind.is_batch_norm:
            yield case, case.layer(), torch_layer(case)


def not_batch_norm(norm: Norm) -> Iterator[Comparison]:
    """Yield a difference for each number of dimensions in which the layer is another norm."""
    for kind in norm.kinds.values():
        norm.one_case(kind, 2, training=True)
        if not kind.is_batch_norm:
            cause = f"With {kind.num_dims} dimensions, the layer is another norm: {kind}."
            yield Comparison(inf, 0, cause)


def torch_layer(case: Case) -> nn.Module:
    """Return PyTorch's layer with the gamma, beta, eps and past of `case.layer()`."""
    kind = case.kind
    assert kind.fit is not None
    build = TORCH[kind.num_dims]
    layer = build(kind.features, kind.fit.eps, _momentum(case)).to(case.dtype)
    with torch.no_grad():
        layer.weight.copy_(kind.fit.scale)
        layer.bias.copy_(kind.fit.shift)
    for x in case.past_batches():
        layer(x)
    return layer.train(case.training)


def _momentum(case: Case) -> float | None:
    """Return the momentum that PyTorch's layer needs: the layer's, or else PyTorch's default.

    The layer's momentum may be the weight of the newest or of the earlier batches. It
    counts only if the layer uses it.
    """
    layer: Any = case.new_layer()
    declared = getattr(layer, "momentum", 0.1)
    if declared is None:
        return None
    if not isinstance(declared, int | float) or not case.kind.has_running_statistics:
        return 0.1
    weight = weights.weights(case).get("mean", 0.1)
    for candidate in (float(declared), 1 - float(declared)):
        if candidate <= 0.5 and abs(candidate - weight) < 1e-3:
            return candidate
    return 0.1


@batch_norm_identity(
    "In training, the output is that of PyTorch's layer.",
    advice="The output differs from that of PyTorch's layer.",
    script=SCRIPT + "assert_close(layer(x), reference(x), rtol=1e-3, atol=1e-3)",
)
def same_output_in_training(norm: Norm) -> Iterator[Comparison]:
    yield from not_batch_norm(norm)
    for case, layer, reference in cases(norm, True):
        for seed in range(3):
            x = inputs.batch((case.shape[0] + seed, *case.shape[1:]), seed).to(case.dtype)
            yield Comparison(inputs.difference(layer(x), reference(x)), 10 * case.tolerance)


@batch_norm_identity(
    "In evaluation, after the same training, the output is that of PyTorch's layer.",
    advice="The running statistics, or their use, differ from those of PyTorch's layer.",
    script=EVALUATION,
)
def same_output_in_evaluation(norm: Norm) -> Iterator[Comparison]:
    yield from not_batch_norm(norm)
    for case, layer, reference in cases(norm, False):
        ys = [inputs.evaluate(module, case.x) for module in (layer, reference)]
        error = inputs.difference(*ys)
        tolerance = 10 * case.tolerance
        yield Comparison(error, tolerance, "" if error <= tolerance else _wrong_statistics(case))
        # A new layer has PyTorch's initial running statistics.
        new, torchs = case.new_layer(), TORCH[case.kind.num_dims](case.kind.features)
        expected = torchs.to(case.dtype).eval()(case.x)
        cause = "Before any training, the output in evaluation differs from that of PyTorch's."
        yield Comparison(
            inputs.difference(inputs.evaluate(new, case.x), expected), max(tolerance, 1e-3), cause
        )


@batch_norm_identity(
    "In training, the gradients are those of PyTorch's layer.",
    advice="The gradient of the input differs from that of PyTorch's layer.",
    script=GRADIENTS.replace("MODE", "True"),
)
def same_gradients_in_training(norm: Norm) -> Iterator[Comparison]:
    yield from _compare_gradients(norm, True)


@batch_norm_identity(
    "In evaluation, the gradients are those of PyTorch's layer.",
    advice="The gradient of the input differs from that of PyTorch's layer.",
    script=GRADIENTS.replace("MODE", "False"),
)
def same_gradients_in_evaluation(norm: Norm) -> Iterator[Comparison]:
    yield from _compare_gradients(norm, False)


def _compare_gradients(norm: Norm, training: bool) -> Iterator[Comparison]:
    yield from not_batch_norm(norm)
    for case, layer, reference in cases(norm, training):
        found = inputs.step(layer, case.x, case.gradient)
        expected = inputs.step(reference, case.x, case.gradient)
        tolerance = 100 * case.tolerance
        error = inputs.difference(found.get("input", torch.zeros(())), expected["input"])
        plain = inputs.evaluate(case.layer(), case.x)
        follows_gradient_mode = not training and inputs.difference(found["output"], plain) > 1e-3
        cause = "With gradients, the layer is not in evaluation: see the property mode."
        yield Comparison(error, tolerance, cause if follows_gradient_mode else "")
        roles = set()
        for name in found.keys() - {"output", "input"}:
            g = found[name]
            errors = [inputs.difference(g.flatten(), expected[role]) for role in ROLES]
            roles.add(ROLES[errors[0] > errors[1]])
            cause = (
                f"The gradient of {name} is neither that of PyTorch's weight nor of its bias. "
                f"Its shape is {tuple(g.shape)}."
            )
            yield Comparison(inputs.smallest(errors), tolerance, cause)
        if len(roles) == 1:
            missing = next(role for role in ROLES if role not in roles)
            cause = f"No parameter has the gradient of PyTorch's {missing}: it is not trained."
            yield Comparison(inf, 0, cause)


@batch_norm_identity(
    "The running statistics after each of three steps are those of PyTorch's layer.",
    advice="The running statistics differ from those of PyTorch's layer.",
    script=EVALUATION,
)
def same_running_statistics(norm: Norm) -> Iterator[Comparison]:
    yield from not_batch_norm(norm)
    for case, layer, reference in cases(norm, True):
        fit = case.kind.fit
        assert fit is not None
        for seed in range(3):
            x = inputs.batch((case.shape[0] + seed, *case.shape[1:]), seed + 40).to(case.dtype)
            layer.train()(x), reference.train()(x)
            found = weights.running_statistics(layer, x, fit.scale, fit.shift)
            expected = weights.running_statistics(reference, x, fit.scale, fit.shift)
            error = inputs.difference(list(found), list(expected))
            tolerance = max(100 * case.tolerance, 1e-6)
            cause = "" if error <= tolerance else _wrong_statistics(case)
            yield Comparison(error, tolerance, cause)


def _wrong_statistics(case: Case) -> str:
    """Return the mistake that explains the running statistics after the past batches, or ""."""
    fit = case.kind.fit
    assert fit is not None
    layer = case.layer()
    found = weights.running_statistics(layer, case.x, fit.scale, fit.shift)
    momentum = _momentum(case) or 0.1
    mistakes = {
        "The running variance is biased: it is divided by m instead of m - 1.": (momentum, 0),
        "The momentum is inverted: the newest batch has weight {0:.3g} instead of {1:.3g}.": (
            1 - momentum,
            1,
        ),
        "The running variance is biased, and the momentum is inverted.": (1 - momentum, 0),
        "The running statistics are not updated.": (0.0, 1),
    }
    for mistake, (weight, correction) in mistakes.items():
        mean = torch.zeros(case.kind.features, dtype=torch.float64)
        var = torch.ones_like(mean)
        for x in case.past_batches():
            axes = [d for d in range(x.dim()) if d != 1]
            batch_var, batch_mean = torch.var_mean(x.double(), axes, correction=correction)
            mean, var = mean.lerp(batch_mean, weight), var.lerp(batch_var, weight)
        if inputs.difference(list(found), [mean, var + fit.eps]) < max(1e-5, 10 * case.tolerance):
            return mistake.format(weight, momentum)
    return ""


@batch_norm_identity(
    "State dicts are interchangeable with those of PyTorch's layer.",
    advice="A state dict loaded from PyTorch's layer gives another output.",
    script="""
reference = TORCH_CLASS.to(x.dtype)
reference.load_state_dict(layer.state_dict())
assert_close(layer.eval()(x), reference.eval()(x))
""",
)
def state_dict_of_pytorch(norm: Norm) -> Iterator[Comparison]:
    was_examined = False
    for case, layer, reference in cases(norm, False):
        shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (layer, reference)]
        if shapes[0] != shapes[1]:
            found = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes[0].items())
            raise NotApplicable(f"The state dict has other keys or shapes: {found}.")
        was_examined = True
        new = case.new_layer()
        new.load_state_dict(reference.state_dict())
        expected = reference(case.x)
        yield Comparison(inputs.difference(new(case.x), expected), 10 * case.tolerance)
        reference.load_state_dict(layer.state_dict())
        yield Comparison(inputs.difference(reference(case.x), layer(case.x)), 10 * case.tolerance)
    if not was_examined:
        raise NotApplicable("The layer is not batch normalization.")
