"""Properties of training and evaluation mode."""

import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bn_lightning.norms.check import inputs
from bn_lightning.norms.check.findings import Comparison, norm_property
from bn_lightning.norms.check.subject import Case, Norm
from bn_lightning.norms.definition import per_channel

# Running statistics that have not converged after this many seconds count as wrong.
MOST_SECONDS = 4


@norm_property(
    "modes",
    "The mode follows module.training, with and without gradients.",
    advice="The mode follows torch.is_grad_enabled(). Use self.training. Otherwise evaluation with "
    "gradients and training without gradients use the wrong statistics.",
    script="""
other = copy.deepcopy(layer)
with torch.no_grad():
    y = other(x)
assert_close(y, layer(x))
assert_close(other.eval()(x), layer.eval()(x))
""",
)
def mode(norm: Norm) -> Iterator[Comparison]:
    for case in norm.cases():
        layer, other = case.layer(), case.layer()
        with torch.no_grad():
            without = layer(case.x)
        yield Comparison(inputs.difference(without, other(case.x)), case.tolerance)
        outputs = [inputs.evaluate(module, case.x) for module in (layer, other)]
        yield Comparison(
            inputs.difference(*outputs),
            case.tolerance,
            "The running statistics are updated only with or only without gradients. Update them "
            "if self.training is True.",
        )
        if not case.training:
            with torch.inference_mode():
                y = case.layer()(case.x)
            yield Comparison(inputs.difference(y.clone(), without), case.tolerance)


@norm_property(
    "modes",
    "Evaluation changes no state.",
    advice="In evaluation, do not write to buffers, parameters or attributes.",
    script="""
layer.eval()
first = layer(x)
layer(x + 1)
assert_close(layer(x), first, rtol=0, atol=0)
""",
)
def evaluation_changes_nothing(norm: Norm) -> Iterator[Comparison]:
    for case in norm.cases(training=(False,)):
        layer, control = case.layer(), case.layer()
        before = {k: v.clone() for k, v in layer.state_dict().items()}
        for x in (case.x, 3 * case.x + 1):
            inputs.evaluate(layer, x)
        yield Comparison(inputs.difference(dict(layer.state_dict()), before), 0)
        x = case.x + 2
        ys = [inputs.evaluate(module, x) for module in (layer, control)]
        yield Comparison(inputs.difference(*ys), 0)
        ys = [module.train()(x) for module in (layer, control)]
        yield Comparison(inputs.difference(*ys), 0)


@norm_property(
    "modes",
    "train() and eval() change nothing but the mode.",
    advice="Do not change parameters, buffers or statistics in train() or eval().",
    script="""
layer.train()(x + 1)
other = copy.deepcopy(layer)
layer.eval().train()
assert_close(layer.state_dict(), other.state_dict(), rtol=0, atol=0)
assert_close(layer(x), other(x), rtol=0, atol=0)
""",
)
def switching_modes(norm: Norm) -> Iterator[Comparison]:
    for case in norm.cases(batch_sizes=(12,)):
        layer, control = case.layer(), case.layer()
        layer.eval().train().eval().train(case.training)
        state = dict(control.state_dict())
        yield Comparison(inputs.difference(dict(layer.state_dict()), state), 0)
        for training in (case.training, not case.training):
            x = case.x + training
            outputs = [module.train(training)(x) for module in (layer, control)]
            yield Comparison(inputs.difference(*outputs), 0)


@norm_property(
    "modes",
    "The output of a sample in evaluation does not depend on the other samples.",
    advice="Evaluation uses the statistics of the batch. Use the running statistics if "
    "self.training is False, or take the statistics of each sample.",
    script="""
layer.eval()
assert_close(layer(x[:1]), layer(x)[:1])
""",
)
def samples_in_evaluation(norm: Norm) -> Iterator[Comparison]:
    cases = norm.cases(
        training=(False,),
        only=lambda kind: not kind.normalizes_batch_in_evaluation,
        otherwise="The layer keeps no running statistics and normalizes each batch by its own.",
    )
    for case in cases:
        y = inputs.evaluate(case.layer(), case.x)
        for i in range(len(y)):
            own = inputs.evaluate(case.layer(), case.x[i : i + 1])
            yield Comparison(inputs.difference(own, y[i : i + 1]), case.tolerance)


@norm_property(
    "modes",
    "Evaluation gives the output of training, once the running statistics have converged.",
    advice="The output in evaluation differs from that in training for the same data. Check that "
    "the running statistics converge to those of the batch, and that gamma, beta and eps are used "
    "in the same way.",
    script="""
for _ in range(5000):
    layer.train()(x)
assert_close(layer.eval()(x), layer.train()(x), rtol=0.02, atol=0.05)
""",
)
def evaluation_matches_training(norm: Norm) -> Iterator[Comparison]:
    for case in norm.cases(training=(False,), batch_sizes=(12,)):
        if case.kind.has_running_statistics:
            yield from _after_convergence(case)
        else:
            ys = [inputs.evaluate(case.layer(), case.x), case.layer().train()(case.x)]
            yield Comparison(inputs.difference(*ys), case.tolerance)


@norm_property(
    "modes",
    "If training uses running statistics, its output is that of evaluation (renormalization).",
    advice="If r and d are not limited, the output in training is (x - running_mean) / "
    "running_std, as in evaluation: r is std / running_std, and d is (mean - running_mean) / "
    "running_std (Ioffe 2017, algorithm 1).",
)
def training_by_running_statistics(norm: Norm) -> Iterator[Comparison]:
    cases = norm.cases(
        training=(True,),
        batch_sizes=(12,),
        only=lambda kind: kind.reads_past and kind.formula != "other",
        otherwise="The output in training does not depend on running statistics.",
    )
    for case in cases:
        layer, x = case.untrained_layer(), equal_groups(case)
        _converge(layer, x)
        inputs.end_warm_up(layer)
        # This batch is so near to the others that usual limits have no effect.
        near = 1.05 * x
        before = inputs.evaluate(layer, near)
        y = layer.train()(near)
        # A layer may use the running statistics of before or after the step.
        after = inputs.evaluate(layer, near)
        errors = [inputs.difference(y, expected) for expected in (before, after)]
        yield Comparison(inputs.smallest(errors), 2e-3)


def _after_convergence(case: Case) -> Iterator[Comparison]:
    x = equal_groups(case)
    layer = case.untrained_layer()
    _converge(layer, x)
    y = inputs.evaluate(layer, x).double()
    # This is the last use of the layer.
    expected = [layer.train()(x).detach().double()]
    tolerance, fit = 0.05, case.kind.fit
    if fit is not None:
        # The running variance may be the biased or the unbiased one.
        mean, var, m = case.kind.groups_of(x).moments(x.double())
        unbiased = fit.formula(x.double(), mean, var * m / (m - 1).clamp(min=1), m, fit.eps)
        expected.append(fit.scaled(unbiased))
        tolerance = 2e-3
    differences = [inputs.difference(y, e) for e in expected]
    yield Comparison(inputs.smallest(differences), tolerance)


def equal_groups(case: Case) -> Tensor:
    """Return a batch in which all groups of samples have the same statistics in each channel.

    Some channels have a variance near usual values of eps.
    """
    size = 1 if case.kind.is_per_sample else min(case.kind.samples_of_a_group, 64)
    x = inputs.batch((size, *case.shape[1:]), 5)
    scale = torch.ones(case.shape[1], dtype=torch.float64)
    scale[::3] = 0.01
    x = x * per_channel(scale, x)
    copies = 2 if case.kind.is_per_sample or case.kind.samples_of_a_group < 64 else 1
    return torch.cat([x] * copies).to(case.dtype)


def _converge(layer: nn.Module, x: Tensor) -> None:
    """Train a layer with a batch until its output in evaluation does not change any more."""
    end = time.monotonic() + MOST_SECONDS
    steps, before = 50, None
    while time.monotonic() < end:
        for _ in range(steps):
            layer.train()(x)
        after = inputs.evaluate(layer, x)
        if before is not None and inputs.difference(after, before) < 1e-4:
            break
        steps, before = 2 * steps, after
