"""Properties of the running statistics, and of the arguments momentum and eps."""

from collections.abc import Iterator
from math import inf
from typing import Any

import torch

from bn_lightning.errors import describe_error
from bn_lightning.norms.check import determination, inputs, reference
from bn_lightning.norms.check.findings import Comparison, NotApplicable, norm_property
from bn_lightning.norms.check.kinds import Kind
from bn_lightning.norms.check.subject import Case, Norm
from bn_lightning.norms.check.weights import (
    moments_of_channels,
    one_group,
    running_statistics,
    weights,
)

NO_RUNNING_STATISTICS = "The layer has no running statistics."


def _has_running_statistics(kind: Kind) -> bool:
    return kind.has_running_statistics and kind.formula != "other"


def _weighted_cases(norm: Norm) -> Iterator[Case]:
    return norm.cases(
        training=(True,),
        batch_sizes=(12,),
        only=_has_running_statistics,
        otherwise=NO_RUNNING_STATISTICS,
    )


@norm_property(
    "running",
    "The newest batch has at most half of the weight of the running statistics.",
    script="""
layer = make().train()
[layer(x) for _ in range(20)]
old, _, new = layer.eval()(x), layer.train()(x + 10), layer.eval()(x)
assert (new - old).abs().max() < 0.6 * 10 * old.std() / x.std()
""",
)
def newest_batch_weight(norm: Norm) -> Iterator[Comparison]:
    for case in _weighted_cases(norm):
        found = weights(case)
        weight = found.get("mean", found["variance"])
        if weight != weight:
            raise NotApplicable("The weight of the newest batch is not the same in all channels.")
        yield Comparison(
            weight,
            0.5 + 1e-3,
            f"The newest batch has weight {weight:.3g} in the running statistics, and all earlier "
            f"ones have {1 - weight:.3g} together. The momentum may be inverted: PyTorch's "
            "momentum 0.1 is the weight of the newest batch, the tutorial's 0.9 that of the rest.",
        )


@norm_property(
    "running",
    "The argument momentum sets the weight of the newest batch, or of the earlier ones.",
    advice="The argument momentum has no effect on the running mean or the running variance.",
    script="""
one, other = make(momentum=0.05).train(), make(momentum=0.3).train()
one(x + 1), other(x + 1)
assert not torch.allclose(one.eval()(x), other.eval()(x), rtol=1e-3)
""",
)
def momentum(norm: Norm) -> Iterator[Comparison]:
    if not norm.build.accepts("momentum"):
        raise NotApplicable("The layer has no argument momentum.")
    for case in _weighted_cases(norm):
        for given in (0.05, 0.3):
            for name, weight in weights(case, momentum=given).items():
                error = min(abs(weight - given), abs(weight - (1 - given)))
                cause = (
                    f"With momentum {given}, the newest batch has weight {weight:.3g} in the "
                    f"running {name}."
                )
                yield Comparison(error, 1e-3, cause)


@norm_property(
    "running",
    "The running mean and the running variance use the same momentum.",
    advice="The running variance is not an average of variances: after a batch, it has moved by "
    "another fraction of the way in each channel, or by another one than the running mean.",
)
def one_weight(norm: Norm) -> Iterator[Comparison]:
    was_examined = False
    for case in _weighted_cases(norm):
        found = weights(case)
        if "mean" in found and case.kind.fit is not None:
            was_examined = True
            cause = (
                f"The newest batch has weight {found['mean']:.3g} in the running mean, and "
                f"{found['variance']:.3g} in the running variance. (NaN: the weight is not the "
                "same in all channels.)"
            )
            yield Comparison(abs(found["mean"] - found["variance"]), 1e-3, cause)
    if not was_examined:
        raise NotApplicable("The layer does not track both a mean and a variance.")


@norm_property(
    "running",
    "With momentum None, all batches have the same weight.",
    advice="With momentum None, the running statistics are the averages over all batches: the "
    "weight of batch number n is 1 / n.",
)
def momentum_none(norm: Norm) -> Iterator[Comparison]:
    if not norm.build.accepts("momentum"):
        raise NotApplicable("The layer has no argument momentum.")
    for case in _weighted_cases(norm):
        x = one_group(case)
        try:
            layer = case.new_layer(momentum=None).train()
            layer(x)
        except Exception as error:
            raise NotApplicable(
                f"The layer does not accept momentum=None: {describe_error(error)}"
            ) from error
        scales = (1.0, 2.0, 0.5)
        for scale in scales[1:]:
            layer(scale * x)
        found = running_statistics(layer, x)
        mean, var, m = moments_of_channels(case.kind, x)
        factor = sum(s * s for s in scales) / 3
        eps = case.kind.added_eps
        yield Comparison(inputs.difference(found.mean, mean * sum(scales) / 3), 1e-4)
        expected = [factor * v + eps for v in (var * m / (m - 1), var)]
        deviations = torch.stack([(s * s * var + eps).sqrt() for s in scales])
        expected.append(deviations.mean(0).square())
        errors = [((found.var - e) / e).abs().max().item() for e in expected]
        yield Comparison(inputs.smallest(errors), 1e-3)


@norm_property(
    "running",
    "Counters count the batches of training, and only these.",
    advice="The counter of batches does not increase by one in each training step.",
    script="""
before = layer.num_batches_tracked.clone()
layer.train()(x), layer.eval()(x)
assert layer.num_batches_tracked == before + 1
""",
)
def counter(norm: Norm) -> Iterator[Comparison]:
    was_examined, no_counter = False, "The layer has no counter."
    for case in norm.cases(
        training=(True,),
        batch_sizes=(12,),
        only=lambda k: not k.state_is_fixed,
        otherwise=no_counter,
    ):
        layer = case.new_layer()
        for name, start in inputs.counters(layer).items():
            is_of_batches = name.endswith("num_batches_tracked")
            if start.item() != 0 and not is_of_batches:
                continue
            was_examined = True
            cause = f"{name} of a new layer is {start.item()}. Start with 0."
            yield Comparison(float(start.item() != 0), 0, cause)
            layer(case.x)
            with torch.no_grad():
                layer(case.x)
            counted = [inputs.counters(layer)[name].item()]
            layer.eval()(case.x)
            counted.append(inputs.counters(layer)[name].item())
            # The counter of PyTorch's instance normalization stays 0.
            is_right = counted[0] == counted[1] and (counted[0] > 0 or case.kind.is_per_sample)
            if is_of_batches and len(set(case.kind.groups.labels[0])) == 1:
                is_right = counted == [2, 2]
            cause = (
                f"{name} is {counted[0]} after two training steps, and {counted[1]} after a "
                "further evaluation. Add 1 in each training step."
            )
            yield Comparison(0 if is_right else inf, 0, cause)
            layer = case.new_layer()
    if not was_examined:
        raise NotApplicable(no_counter)


@norm_property(
    "running",
    "reset_running_stats() gives the running statistics of a new layer.",
    advice="reset_running_stats() leaves a statistic or a counter as it was, or changes a "
    "parameter.",
    script="""
fresh = copy.deepcopy(layer)
layer.train()(x + 3)
layer.reset_running_stats(), fresh.reset_running_stats()
assert_close(layer.eval()(x), fresh.eval()(x))
""",
)
def reset_running_stats(norm: Norm) -> Iterator[Comparison]:
    cases = norm.cases(
        batch_sizes=(12,),
        only=lambda kind: kind.has_running_statistics,
        otherwise=NO_RUNNING_STATISTICS,
    )
    for case in cases:
        layer, fresh = case.layer(), case.untrained_layer()
        reset: Any = getattr(layer, "reset_running_stats", None)
        if not callable(reset):
            raise NotApplicable("The layer has no method reset_running_stats.")
        reset()
        for x in (case.x, case.x + 1, case.x - 1):
            ys = [module.train(case.training)(x) for module in (layer, fresh)]
            yield Comparison(inputs.difference(*ys), case.tolerance)
        ys = [inputs.evaluate(module, case.x) for module in (layer, fresh)]
        yield Comparison(inputs.difference(*ys), case.tolerance)
        state = [dict(module.state_dict()) for module in (layer, fresh)]
        yield Comparison(inputs.difference(*state), case.tolerance)


@norm_property(
    "running",
    "The argument eps is the number that is added to the variance, in training and evaluation.",
    advice="The argument eps has no effect on the output.",
    script="""
one, other = (make(eps=eps).train(layer.training) for eps in (0.3, 1e-5))
assert not torch.allclose(one(x / 9), other(x / 9), rtol=1e-3)
""",
)
def eps(norm: Norm) -> Iterator[Comparison]:
    if not norm.build.accepts("eps"):
        raise NotApplicable("The layer has no argument eps.")
    given, was_examined = 0.3, False
    for case in norm.cases(training=(True,), batch_sizes=(12,)):
        if case.kind.fit is None:
            continue
        was_examined = True
        layers = [case.layer(eps=e) for e in (given, case.kind.fit.eps)]
        if case.kind.formula != reference.FIXED:
            y = layers[0](case.x).double()
            moments = determination.groups(case).moments(case.x.double())
            expected = case.kind.fit.formula(case.x.double(), *moments, given)
            error = inputs.difference(y, case.kind.fit.scaled(expected))
            cause = f"With eps={given}, the output in training is not that of this eps."
            yield Comparison(error, max(1e-4, case.tolerance), cause)
        if case.kind.has_running_statistics or case.kind.state_is_fixed:
            ys = [inputs.evaluate(layer, case.x) for layer in layers]
            change = inputs.difference(*ys)
            cause = "In evaluation, the argument eps has no effect on the output."
            yield Comparison(0 if change > 1e-3 else inf, 0, cause)
    if not was_examined:
        raise NotApplicable("The formula of the layer is unknown.")
