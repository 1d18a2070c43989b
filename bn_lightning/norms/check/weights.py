"""Running statistics of a layer, and the weight of the newest batch in them.

The running statistics are read from the output in evaluation, so that no name of a buffer
has to be known: for a new layer, it is (x - running_mean) / sqrt(running_var + eps).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bn_lightning.norms.check import inputs, modes
from bn_lightning.norms.check.kinds import Kind
from bn_lightning.norms.check.subject import Case


class Running(NamedTuple):
    """Running statistics by their effect, (C,) each. `var` includes eps."""

    mean: Tensor
    var: Tensor


def running_statistics(
    layer: nn.Module, x: Tensor, scale: Tensor | float = 1.0, shift: Tensor | float = 0.0
) -> Running:
    """Return the running statistics that explain the layer's output in evaluation.

    Args:
        scale, shift: the layer's gamma and beta, (C,).
    """
    y = inputs.evaluate(layer, x).double().transpose(0, 1).flatten(1)
    values = x.double().transpose(0, 1).flatten(1)
    centred = values - values.mean(1, keepdim=True)
    slope = (centred * y).mean(1) / centred.square().mean(1)
    offset = y.mean(1) - slope * values.mean(1)
    return Running((shift - offset) / slope, (scale / slope).square())


def weights(case: Case, **arguments: Any) -> dict[str, float]:
    """Return the weight of the newest batch in the running "mean" and "variance".

    A weight that differs between channels is NaN. A layer that does not centre has no
    weight of the mean. The layer may average deviations instead of variances, and these
    may be biased or not.
    """
    layer = case.new_layer(**arguments).train()
    x = one_group(case)
    for seed in range(5):
        layer(3 * x + seed)
    before = running_statistics(layer, x)
    layer(x)
    after = running_statistics(layer, x)
    mean, var, m = moments_of_channels(case.kind, x)
    found = {}
    if before.mean.abs().max() > 1e-3:
        found["mean"] = _weight([(before.mean, after.mean, mean)])
    else:
        var = var + mean.square()
    eps = case.kind.added_eps
    ways = [
        (before.var**power, after.var**power, (v + eps) ** power)
        for power in (1.0, 0.5)
        for v in (var * m / (m - 1), var)
    ]
    found["variance"] = _weight(ways)
    return found


def _weight(ways: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    """Return the fraction of the way from "before" to "goal", or NaN if channels differ.

    Args:
        ways: before, after, goal. The one with the most equal fractions counts.
    """
    fractions = [(after - before) / (goal - before) for before, after, goal in ways]
    best = min(fractions, key=lambda f: float((f.max() - f.min()).nan_to_num(torch.inf)))
    spread = best.max() - best.min()
    return best.mean().item() if spread < 1e-3 * (1 + best.abs().max()) else float("nan")


def one_group(case: Case) -> Tensor:
    """Return a batch of one group of samples: a layer updates its running statistics once."""
    x = modes.equal_groups(case)
    return x[: min(len(x), case.kind.samples_of_a_group)]


def moments_of_channels(kind: Kind, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, biased variance and number of values of each channel, (C,)."""
    moments = kind.groups_of(x).moments(x.double())
    mean, var, m = (t.transpose(0, 1).flatten(1)[:, 0] for t in moments)
    return mean, var, m
