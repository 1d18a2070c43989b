"""Reference formulas of normalization, and which of them a layer computes.

A normalization divides the elements of its input into groups, such as all elements of a
channel. Each group is normalized by its own statistics:

    y = scale * (x - mean) / sqrt(var + eps) + shift

scale and shift have one value per channel. `fit` finds them, and eps, from inputs and
outputs, so that no name of a parameter has to be known.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bn_lightning.norms.definition import per_channel

# Maps the input, the mean, the biased variance and the size of each element's group, and
# eps, to the normalized input.
Formula = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
# Input, groups, output.
Sample = tuple[Tensor, "Groups", Tensor]

CENTRING = "centring"
ROOT_MEAN_SQUARE = "not centring"
LIMITED = "limited"
FIXED = "fixed"


@dataclass(frozen=True)
class Groups:
    """A partition of the elements of an input.

    Attributes:
        labels: for each axis, the label of each index. Two elements are in the same group
            if their labels agree on all axes.
    """

    labels: tuple[tuple[int, ...], ...]

    @classmethod
    def of_channels(cls, shape: Sequence[int]) -> "Groups":
        """Return one group for each channel: all samples and positions."""
        samples, channels, *positions = shape
        return cls(((0,) * samples, tuple(range(channels)), *((0,) * size for size in positions)))

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, biased variance and size of the group of each element, like x."""
        ids = torch.zeros(x.shape, dtype=torch.long)
        for axis, labels in enumerate(self.labels):
            shape = [1] * x.dim()
            shape[axis] = -1
            ids = ids * (max(labels) + 1) + torch.tensor(labels).view(shape)
        flat = ids.flatten()
        number = int(flat.max()) + 1

        def averaged(values: Tensor) -> Tensor:
            total = torch.zeros(number, dtype=values.dtype)
            return (total.index_add(0, flat, values.flatten()) / sizes)[flat].view(x.shape)

        sizes = torch.zeros(number, dtype=x.dtype).index_add(0, flat, torch.ones_like(x).flatten())
        mean = averaged(x)
        return mean, averaged((x - mean).square()), sizes[flat].view(x.shape)


def _with_statistics_in(dtype: torch.dtype) -> Formula:
    def formula(x: Tensor, mean: Tensor, var: Tensor, m: Tensor, eps: float) -> Tensor:
        return (x - mean.to(dtype).to(x.dtype)) / (var.to(dtype).to(x.dtype) + eps).sqrt()

    return formula


CORRECT: dict[str, Formula] = {
    CENTRING: lambda x, mean, var, m, eps: (x - mean) / (var + eps).sqrt(),
    ROOT_MEAN_SQUARE: lambda x, mean, var, m, eps: x / (var + mean.square() + eps).sqrt(),
    LIMITED: lambda x, mean, var, m, eps: (x - mean) / var.clamp(min=eps).sqrt(),
    FIXED: lambda x, mean, var, m, eps: x,
}
# Common mistakes, by their description.
WRONG: dict[str, Formula] = {
    "The variance is divided by m - 1. Divide it by m, the number of values.": (
        lambda x, mean, var, m, eps: (x - mean) / (var * m / (m - 1).clamp(min=1) + eps).sqrt()
    ),
    "eps is added to the standard deviation. Add it to the variance.": (
        lambda x, mean, var, m, eps: (x - mean) / (var.sqrt() + eps)
    ),
    "eps is added to the root mean square. Add it to the mean square.": (
        lambda x, mean, var, m, eps: x / ((var + mean.square()).sqrt() + eps)
    ),
    "The input is divided by its variance. Divide by the standard deviation.": (
        lambda x, mean, var, m, eps: (x - mean) / (var + eps)
    ),
    "The input is divided by its mean square. Divide by the square root of it.": (
        lambda x, mean, var, m, eps: x / (var + mean.square() + eps)
    ),
    "The input is centred, but not divided by its standard deviation.": (
        lambda x, mean, var, m, eps: x - mean
    ),
    "The input is centred, but divided by its root mean square, not its deviation.": (
        lambda x, mean, var, m, eps: (x - mean) / (var + mean.square() + eps).sqrt()
    ),
    "The input is divided by its standard deviation, but not centred.": (
        lambda x, mean, var, m, eps: x / (var + eps).sqrt()
    ),
    "The input is multiplied by its standard deviation. Divide by it.": (
        lambda x, mean, var, m, eps: (x - mean) * (var + eps).sqrt()
    ),
    "The mean is added. Subtract it.": lambda x, mean, var, m, eps: (x + mean) / (var + eps).sqrt(),
    "The statistics are computed in bfloat16. Compute them in float32.": (
        _with_statistics_in(torch.bfloat16)
    ),
    "The statistics are computed in float16. Compute them in float32.": (
        _with_statistics_in(torch.float16)
    ),
}


@dataclass(frozen=True)
class Fit:
    """A formula with the scale, shift and eps that explain the outputs best.

    Attributes:
        name: a key of `CORRECT` or `WRONG`.
        scale, shift: (C,), float64.
        residual: the largest difference from the outputs, see `inputs.difference`.
    """

    name: str
    formula: Formula
    eps: float
    scale: Tensor
    shift: Tensor
    residual: float

    def output(self, x: Tensor, groups: Groups) -> Tensor:
        """Return the output of the formula. Gradients flow through the statistics."""
        return self.scaled(self.formula(x, *groups.moments(x), self.eps))

    def scaled(self, normalized: Tensor) -> Tensor:
        """Return the output for a normalized input."""
        scale, shift = (per_channel(t, normalized) for t in (self.scale, self.shift))
        return normalized * scale + shift


def fit(
    samples: list[Sample],
    formulas: dict[str, Formula],
    candidates: Iterable[float],
    tolerance: float,
) -> Fit:
    """Return the best fit of the outputs.

    Args:
        samples: inputs and outputs, float64.
        candidates: likely values of eps. If none of them fits, eps is searched for.
        tolerance: the residual from which on a fit is accepted without searching.
    """
    prepared = [(x, groups.moments(x), y) for x, groups, y in samples]
    best: Fit | None = None
    for name, formula in formulas.items():
        for eps in candidates:
            found = _fit(name, formula, eps, prepared)
            if best is None or found.residual < best.residual:
                best = found
            if found.residual <= tolerance:
                return found
    for name, formula in formulas.items():
        low, high = -16.0, 0.5  # of log10(eps)
        for _ in range(8):
            exponents = [low + (high - low) * i / 11 for i in range(12)]
            fits = [_fit(name, formula, 10**e, prepared) for e in exponents]
            i = min(range(12), key=lambda i: fits[i].residual)
            low, high = exponents[max(i - 1, 0)], exponents[min(i + 1, 11)]
            assert best is not None
            if fits[i].residual < best.residual:
                best = fits[i]
    assert best is not None
    return best


def _fit(
    name: str,
    formula: Formula,
    eps: float,
    prepared: list[tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor]],
) -> Fit:
    """Regress the outputs on the normalized inputs, for each channel."""
    pairs = [(formula(x, *moments, eps), y) for x, moments, y in prepared]
    hats, ys = (
        torch.cat([t.transpose(0, 1).flatten(1) for t in ts], 1) for ts in zip(*pairs, strict=True)
    )
    if not bool(hats.isfinite().all() and ys.isfinite().all()):
        nothing = torch.zeros(len(hats), dtype=hats.dtype)
        return Fit(name, formula, eps, nothing, nothing, math.inf)
    centred = hats - hats.mean(1, keepdim=True)
    variance = centred.square().mean(1).clamp(min=1e-300)
    scale = (centred * (ys - ys.mean(1, keepdim=True))).mean(1) / variance
    shift = ys.mean(1) - scale * hats.mean(1)
    error = (ys - hats * scale[:, None] - shift[:, None]).abs().max()
    return Fit(name, formula, eps, scale, shift, float(error / ys.abs().max().clamp(min=1)))


def is_affine_in_each_cell(samples: list[Sample], has_groups: bool) -> bool:
    """Return whether, in each group and channel, the output is an affine function of the input.

    Without groups, all elements of a channel count as one.

    If so, the layer subtracts something and multiplies by something in each group. If
    not, it mixes elements, as a convolution does, or is nonlinear. Cells of fewer than 3
    elements count as affine.
    """
    for x, groups, y in samples:
        channels = tuple(range(x.shape[1]))
        cells = Groups((groups.labels[0], channels, *groups.labels[2:]))
        if not has_groups:
            cells = Groups.of_channels(x.shape)
        mean, var, _ = cells.moments(x)
        centred, y_centred = x - mean, y - cells.moments(y)[0]
        slope = cells.moments(centred * y_centred)[0] / var.clamp(min=1e-300)
        error = (y_centred - slope * centred).abs().max() / y.abs().max().clamp(min=1)
        if not error < 1e-4:
            return False
    return True
