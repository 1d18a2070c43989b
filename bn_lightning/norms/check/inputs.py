"""Random inputs, parameters and gradients, steps of a layer, and differences.

All values are random, with a fixed seed. A bug can be invisible at special values, such
as gamma = 1 and beta = 0, or at equal sizes of height and width.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Sizes of the positions for each number of dimensions. They differ from each other, from
# the numbers of channels, and from the batch sizes.
POSITIONS: dict[int, tuple[int, ...]] = {2: (), 3: (5,), 4: (4, 3), 5: (4, 3, 2)}
AXES = ("samples", "channels", "depth", "height", "width")


def axis_name(axis: int, num_dims: int) -> str:
    """Return the name of an axis of the input."""
    if axis < 2:
        return AXES[axis]
    return "positions" if num_dims == 3 else AXES[axis - num_dims]


def random(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return normally distributed values."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype)


def uniform(shape: Sequence[int], seed: int, low: float, high: float) -> Tensor:
    """Return uniformly distributed values, float64."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(tuple(shape), generator=generator, dtype=torch.float64)
    return low + (high - low) * values


def batch(shape: Sequence[int], seed: int = 0, scale: float = 1.0) -> Tensor:
    """Return an input, float64, whose samples and channels differ in mean and deviation.

    Args:
        shape: (N, C) or (N, C, ...).
        scale: a factor for all values.
    """
    ones = [1] * (len(shape) - 2)
    of_channels, of_samples = (1, shape[1], *ones), (shape[0], 1, *ones)
    deviation = uniform(of_channels, seed + 1, 0.5, 2) * uniform(of_samples, seed + 2, 0.7, 1.5)
    mean = uniform(of_channels, seed + 3, -1.5, 1.5) + uniform(of_samples, seed + 4, -0.5, 0.5)
    return scale * (random(shape, seed) * deviation + mean)


def randomize_parameters(layer: nn.Module, seed: int) -> None:
    """Move each parameter away from its initial value: to both signs, and never near 0.

    Half of the gammas become negative. Parameters that are not trained move too.
    """
    for i, parameter in enumerate(layer.parameters()):
        move = uniform(parameter.shape, 100 * seed + i, 0.4, 1.4)
        is_odd = torch.arange(parameter.numel()).view(parameter.shape) % 2 == 1
        with torch.no_grad():
            parameter.add_(torch.where(is_odd, -1.2 - move, move).to(parameter.dtype))


def randomize_buffers(layer: nn.Module, seed: int) -> None:
    """Change the floating-point buffers of a layer. Positive values stay positive."""
    for i, buffer in enumerate(layer.buffers()):
        if buffer.is_floating_point():
            factor = uniform(buffer.shape, 300 * seed + i, 0.5, 1.5)
            buffer.mul_(factor.to(buffer.dtype)).add_(0.3)


def counters(layer: nn.Module) -> dict[str, Tensor]:
    """Return the integer buffers of a layer that hold one value, such as a number of batches."""
    return {
        name: buffer
        for name, buffer in layer.named_buffers()
        if buffer.numel() == 1 and buffer.dtype in (torch.int32, torch.int64)
    }


def end_warm_up(layer: nn.Module) -> None:
    """Advance the counters of a layer, as if it had been trained for a long time."""
    for counter in counters(layer).values():
        counter.add_(100_000)


def evaluate(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the output in evaluation, without gradients. The layer keeps its mode."""
    mode = layer.training
    with torch.no_grad():
        y: Tensor = layer.eval()(x)
    layer.train(mode)
    return y


def step(layer: nn.Module, x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """Run a forward and a backward pass.

    Args:
        x: the input. Its memory format stays as it is.
        gradient: the gradient of the output.

    Returns:
        The output, and the gradients of the input and of each trained parameter, by name:
        "output", "input", and the parameter's name. A parameter without gradient is
        missing.
    """
    layer.zero_grad()
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    y.backward(gradient.to(y.dtype))
    results = {"output": y.detach()}
    if leaf.grad is not None:
        results["input"] = leaf.grad
    for name, parameter in layer.named_parameters():
        if parameter.grad is not None:
            results[name] = parameter.grad
    return results


def difference(one: Any, other: Any) -> float:
    """Return the largest difference between two tensors, or between dicts or lists of tensors.

    It is divided by the largest absolute value of the second tensor, if that is above 1.
    It is infinite if the shapes or the keys differ, and NaN if a value is NaN or if both
    are infinite.
    """
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return float("inf")
        return difference([one[key] for key in other], list(other.values()))
    if not isinstance(one, Tensor):
        if len(one) != len(other):
            return float("inf")
        return largest(difference(a, b) for a, b in zip(one, other, strict=True))
    if one.shape != other.shape:
        return float("inf")
    if not one.numel():
        return 0.0
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).abs().max() / other.abs().max().clamp(min=1))


def largest(values: Iterable[float]) -> float:
    """Return the largest value, or 0 if there is none, or NaN if one is NaN."""
    # max(0.0, nan) is 0.0.
    found = list(values)
    return float("nan") if any(v != v for v in found) else max(found, default=0.0)


def smallest(values: Sequence[float]) -> float:
    """Return the smallest value, or NaN if one is NaN."""
    return float("nan") if any(v != v for v in values) else min(values)


def is_finite(tensors: Any) -> bool:
    values = tensors.values() if isinstance(tensors, dict) else tensors
    return all(bool(t.isfinite().all()) for t in values)
