"""Gradients of a layer by autograd and by finite differences, and causes of differences."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from bn_lightning.norms.check import determination, inputs, reference
from bn_lightning.norms.check.findings import Comparison
from bn_lightning.norms.check.subject import Case
from bn_lightning.norms.definition import per_channel

# Half of the distance of the two points of a finite difference. Float32 needs a larger one.
STEPS = {torch.float64: 1e-5, torch.float32: 3e-3, torch.bfloat16: 3e-1}
GRADIENT_TOLERANCES = {torch.float64: 2e-6, torch.float32: 2e-2, torch.bfloat16: 3e-1}


def compare(case: Case) -> Iterator[Comparison]:
    """Compare the gradients of a layer with finite differences, for input and each parameter."""
    found = inputs.step(case.layer(), case.x, case.gradient)
    layer = case.layer()
    trained = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    if case.training and case.kind.reads_past:
        yield from _compare_renormalized(case, found)
    elif case.training and case.kind.fit is not None and case.kind.computes_in != torch.float64:
        # Finite differences are too coarse for a layer that computes in float32.
        expected = reference_gradient(case, detached=())
        yield Comparison(
            inputs.difference(found["input"], expected), 10 * case.tolerance, _cause(case, found)
        )
    else:
        yield from _directional(case, found, "input", case.x)
    for name, parameter in trained.items():
        yield from _directional(case, found, name, parameter.detach())


def _directional(
    case: Case, found: dict[str, Tensor], name: str, at: Tensor
) -> Iterator[Comparison]:
    h = STEPS[case.kind.computes_in]
    for seed in range(2):
        direction = inputs.random(at.shape, seed + 60).to(at.dtype)
        up, down = (_value(case, name, sign * h * direction) for sign in (1, -1))
        numeric = (up - down) / (2 * h)
        exact = 0.0
        if name in found:
            exact = float((found[name] * direction).double().sum())
        error = abs(numeric - exact) / max(1.0, abs(numeric))
        tolerance = GRADIENT_TOLERANCES[case.kind.computes_in]
        if case.kind.computes_in != torch.float64 and not case.kind.is_affine:
            # The two points may be on both sides of the bend of an activation.
            tolerance *= 5
        cause = ""
        if not error <= tolerance:
            cause = _cause(case, found) if name == "input" else f"The gradient of {name} is wrong."
            if name not in found:
                cause = f"The layer's output depends on {name}, but it has no gradient."
        yield Comparison(error, tolerance, cause)


def _value(case: Case, name: str, move: Tensor) -> float:
    """Return sum(output * gradient) after a move of the input or of a parameter."""
    layer, x = case.layer(), case.x
    with torch.no_grad():
        if name == "input":
            x = x + move
        else:
            layer.get_parameter(name).add_(move)
    return float((layer(x).detach().double() * case.gradient.double()).sum())


def _compare_renormalized(case: Case, found: dict[str, Tensor]) -> Iterator[Comparison]:
    """Compare the gradient of the input of a layer whose training uses running statistics.

    In each channel, the output is a * x + b. A layer that centres takes a and b from the
    running statistics, but its gradient is that of batch normalization (Ioffe 2017,
    algorithm 1, where r and d are constants); otherwise training diverges (Ioffe and
    Szegedy 2015, section 2). A layer that does not centre may also use the exact
    derivative, or treat the statistics as constants.
    """
    of_input = found.get("input", torch.zeros(()))
    shifts = [_fit(case, reference.FIXED, past).shift for past in (1, 2)]
    centres = inputs.difference(*shifts) > 1e-6
    names = [reference.CENTRING] if centres else list(reference.CORRECT)
    errors = []
    for name in names:
        expected = _renormalized_gradient(case, name)
        errors.append(inputs.difference(of_input, expected))
    if not centres and not inputs.smallest(errors) <= 10 * case.tolerance:
        yield from _directional(case, found, "input", case.x)
        return
    cause = (
        "The gradient of the input is not that of batch normalization times r. In the backward "
        "pass, r and d are constants, and gradients flow through the batch's mean and variance "
        "(Ioffe 2017, algorithm 1)."
    )
    for detached in (("mean",), ("variance",), ("mean", "variance")):
        wrong = _renormalized_gradient(case, reference.CENTRING, detached)
        if inputs.difference(of_input, wrong) < 100 * case.tolerance:
            cause = (
                f"No gradient flows through the batch's {' and '.join(detached)}: it is detached, "
                "or r and d are not."
            )
    yield Comparison(inputs.smallest(errors), 10 * case.tolerance, cause)


def _fit(case: Case, name: str, past: int | None = None) -> reference.Fit:
    """Return the fit of a formula to the output for one input."""
    y = case.layer(past)(case.x).detach().double()
    sample = case.x.double(), case.kind.groups_of(case.x), y
    eps = determination.eps_candidates(case.build, case.kind)[0]
    return reference.fit([sample], {name: reference.CORRECT[name]}, [eps], tolerance=float("inf"))


def _renormalized_gradient(case: Case, name: str, detached: tuple[str, ...] = ()) -> Tensor:
    """Return the gradient of the input by the formula that fits the output for this input."""
    return _gradient_of_formula(case, _fit(case, name), detached)


def reference_gradient(case: Case, detached: tuple[str, ...]) -> Tensor:
    """Return the gradient of the input in training by the layer's formula.

    Args:
        detached: the statistics that count as constants: "mean", "variance".
    """
    assert case.kind.fit is not None
    return _gradient_of_formula(case, case.kind.fit, detached)


def _gradient_of_formula(case: Case, fit: reference.Fit, detached: tuple[str, ...]) -> Tensor:
    x = case.x.double().requires_grad_()
    mean, var, m = case.kind.groups_of(x).moments(x)
    mean = mean.detach() if "mean" in detached else mean
    var = var.detach() if "variance" in detached else var
    y = fit.formula(x, mean, var, m, fit.eps) * per_channel(fit.scale, x)
    (gradient,) = torch.autograd.grad(y, x, case.gradient.double())
    return gradient


def _cause(case: Case, found: dict[str, Tensor]) -> str:
    """Return the mistake that explains the gradient of the input, or ""."""
    if "input" not in found:
        return "The input has no gradient: the graph is cut between input and output."
    fit = case.kind.fit
    if fit is None or not case.training:
        return ""
    # In a batch of 2, the terms of the gradient cannot be told apart.
    case = replace(case, shape=(12, *case.shape[1:]))
    dx = inputs.step(case.layer(), case.x, case.gradient)["input"].double()
    tolerance = 100 * case.tolerance
    for detached in (("variance",), ("mean",), ("mean", "variance")):
        if inputs.difference(dx, reference_gradient(case, detached)) < tolerance:
            return f"No gradient flows through the {' and the '.join(detached)}."
    without_gamma = reference_gradient(case, ()) / per_channel(fit.scale, dx)
    if inputs.difference(dx, without_gamma) < tolerance:
        return "The gradient of the input lacks the factor gamma."
    return _wrong_terms(case, dx) if fit.name == reference.CENTRING else ""


def _wrong_terms(case: Case, dx: Tensor) -> str:
    """Return the factors of the two mean terms of the gradient, or "" if there are more terms."""
    fit, groups = case.kind.fit, case.kind.groups_of(case.x)
    assert fit is not None
    mean, var, _ = groups.moments(case.x.double())
    std = (var + fit.eps).sqrt()
    x_hat = (case.x.double() - mean) / std
    g = case.gradient.double() * per_channel(fit.scale, dx)
    terms = [g, groups.moments(g)[0], x_hat * groups.moments(g * x_hat)[0]]
    matrix, target = torch.stack([t.flatten() for t in terms], 1), (dx * std).flatten()
    first, second, third = torch.linalg.lstsq(matrix, target[:, None]).solution[:, 0].tolist()
    if not (matrix @ torch.tensor([first, second, third]).double() - target).abs().max() < 1e-3:
        return ""
    return (
        "The gradient of the input is gamma / std * (a * dy - b * mean(dy) - c * x_hat * "
        f"mean(dy * x_hat)) with a = {first:.3g}, b = {-second:.3g} and c = {-third:.3g} for "
        f"input {case.shape}. All three must be 1."
    )


def second_derivative(case: Case) -> tuple[float, float]:
    """Return a second derivative by finite differences of the gradient, and by autograd.

    Raises:
        Exception: the backward pass cannot be differentiated.
    """
    direction, weights = inputs.random(case.shape, 70), inputs.random(case.shape, 71)

    def gradient(x: Tensor, create_graph: bool) -> Tensor:
        loss = (case.gradient * case.layer()(x).square()).sum()
        (dx,) = torch.autograd.grad(loss, x, create_graph=create_graph)
        return dx

    leaf = case.x.requires_grad_()
    dx = gradient(leaf, create_graph=True)
    (ddx,) = torch.autograd.grad((dx * weights).sum(), leaf)
    exact = float((ddx * direction).sum())
    h = 1e-5
    moved = [(case.x + sign * h * direction).requires_grad_() for sign in (1, -1)]
    up, down = (float((gradient(x, False) * weights).sum()) for x in moved)
    return (up - down) / (2 * h), exact


def of_squares(
    layer: nn.Module,
    x: Tensor,
    gradient: Tensor,
    call: Callable[[Tensor], Tensor] | None = None,
) -> list[Tensor]:
    """Return the output, and the gradients of sum(gradient * output²) by input and parameters."""
    leaf = x.detach().requires_grad_()
    y = (call or layer)(leaf)
    torch.autograd.backward((gradient * y.square()).sum())
    assert leaf.grad is not None
    return [y.detach(), leaf.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


def by_torch_func(case: Case) -> dict[str, Tensor]:
    """Return the gradients of the input and the trained parameters by torch.func.grad."""
    layer, g = case.layer(), case.gradient
    trained = {n: p.detach() for n, p in layer.named_parameters() if p.requires_grad}
    buffers = {n: b.clone() for n, b in layer.named_buffers()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(layer, parameters | buffers, (x,))
        return (y * g).sum()

    of_parameters, of_x = torch.func.grad(loss, argnums=(0, 1))(trained, case.x)
    return {"input": of_x, **of_parameters}
