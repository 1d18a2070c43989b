"""Tools of the checks: inputs, training steps, differences, and torch's layer to compare with."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bn_lightning.norms import registry, torch_norms
from bn_lightning.norms.check.findings import Make

FEATURES = 6
SHAPES = {2: (32, FEATURES), 4: (8, FEATURES, 5, 4)}


def make_layer(
    name: str, norm_args: dict[str, Any], num_dims: int, num_features: int = FEATURES
) -> nn.Module:
    """Build a norm by its name or import path.

    With the first two arguments bound by `functools.partial`, this is a `Make`.
    """
    return registry.make(name, num_features, num_dims, norm_args)


def batch(num_dims: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return values of the shape in `SHAPES`, with another mean and deviation in each channel."""
    generator = torch.Generator().manual_seed(seed)
    channel = torch.arange(1, FEATURES + 1, dtype=torch.float64).view(-1, *[1] * (num_dims - 2))
    values = torch.randn(SHAPES[num_dims], generator=generator, dtype=torch.float64)
    return (values * channel + channel).to(dtype)


def each(make: Make) -> Iterator[tuple[int, nn.Module, Tensor]]:
    """Yield number of dimensions, a fresh float64 layer in training, and a batch.

    The first is for the place behind a linear layer, the second for that behind a convolution.
    """
    for num_dims in SHAPES:
        yield num_dims, make(num_dims).double().train(), batch(num_dims)


def step(layer: nn.Module, x: Tensor, gradient: Tensor | None = None) -> list[Tensor]:
    """Return output, gradient by the input, and gradients by the parameters of a training step.

    `gradient` is the gradient by the output, at random unless given.
    """
    layer.zero_grad()
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(leaf)
    y.backward((gradient_of(y.shape) if gradient is None else gradient).to(y.dtype))
    assert leaf.grad is not None
    by_parameters = [p.grad.flatten() for p in layer.parameters() if p.grad is not None]
    return [y.detach(), leaf.grad, *by_parameters]


def gradient_of(shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Return the gradient by an output of that shape with which all steps are taken."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def after_many_steps(layer: nn.Module, x: Tensor, steps: int = 1_000) -> nn.Module:
    """Return the layer after that many training steps with the same batch."""
    for _ in range(steps):
        layer(x)
    return layer


def in_eval(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the output in eval mode, of a copy of the layer."""
    with torch.no_grad():
        return copy.deepcopy(layer).eval()(x)  # type: ignore[no-any-return]


def difference(one: Any, other: Any) -> float:
    """Return the largest difference between two tensors, or between two sequences of tensors.

    The unit is the largest absolute value of the second tensor, or 1 if that is larger.
    """
    if not isinstance(one, Tensor):
        return max((difference(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
    if one.shape != other.shape:
        raise ValueError(f"shapes {tuple(one.shape)} and {tuple(other.shape)}")
    if not one.numel():
        return 0.0
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).abs().max() / max(1.0, other.abs().max().item()))


def reference_layer(layer: nn.Module, num_dims: int) -> nn.Module:
    """Return torch's layer with the eps and the dtype of this layer."""
    reference = torch_norms.builtin(FEATURES, num_dims, eps_of(layer))
    return reference.to(next((p.dtype for p in layer.parameters()), torch.float64))


def eps_of(layer: nn.Module) -> float:
    """Return the layer's eps, or the usual one if it has no such attribute."""
    return float(getattr(layer, "eps", 1e-5))


def normalized(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    """Return x normalized by its statistics over these axes."""
    var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) / (var + eps).sqrt()


def all_but_channels(num_dims: int) -> tuple[int, ...]:
    """Return the axes over which batch normalization takes its statistics."""
    return tuple(d for d in range(num_dims) if d != 1)
