"""Helpers for the checks: inputs, training steps, differences, and PyTorch's layer as reference."""

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

    `functools.partial` binds the first two arguments, which gives a `Make`.
    """
    return registry.make(name, num_features, num_dims, norm_args)


def batch(num_dims: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return random values, with another mean and deviation in each channel."""
    generator = torch.Generator().manual_seed(seed)
    channel = torch.arange(1, FEATURES + 1, dtype=torch.float64).view(-1, *[1] * (num_dims - 2))
    values = torch.randn(SHAPES[num_dims], generator=generator, dtype=torch.float64)
    return (values * channel + channel).to(dtype)


def each(make: Make) -> Iterator[tuple[int, nn.Module, Tensor]]:
    """Yield the number of dimensions, a new float64 layer in training mode, and a batch.

    The first layer takes the output of a linear layer, the second that of a
    convolution.
    """
    for num_dims in SHAPES:
        yield num_dims, make(num_dims).double().train(), batch(num_dims)


def step(layer: nn.Module, x: Tensor, gradient: Tensor | None = None) -> list[Tensor]:
    """Return the output of a training step, and the gradients of the input and each parameter.

    `gradient` is the gradient of the output. The default is random.
    """
    layer.zero_grad()
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(leaf)
    y.backward((gradient_of(y.shape) if gradient is None else gradient).to(y.dtype))
    assert leaf.grad is not None
    by_parameters = [p.grad.flatten() for p in layer.parameters() if p.grad is not None]
    return [y.detach(), leaf.grad, *by_parameters]


def gradient_of(shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Return the gradient of an output of this shape: fixed random values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def after_many_steps(layer: nn.Module, x: Tensor, steps: int = 1_000) -> nn.Module:
    """Return the layer after training steps with the same batch."""
    for _ in range(steps):
        layer(x)
    return layer


def in_eval(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the output of the layer in eval mode. The layer itself does not change."""
    with torch.no_grad():
        return copy.deepcopy(layer).eval()(x)  # type: ignore[no-any-return]


def difference(one: Any, other: Any) -> float:
    """Return the largest difference between two tensors, or between two sequences of tensors.

    It is divided by the largest absolute value of the second tensor, if that is above
    1.

    Raises:
        ValueError: the shapes differ.
    """
    if not isinstance(one, Tensor):
        return max((difference(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
    if one.shape != other.shape:
        raise ValueError(f"The shapes {tuple(one.shape)} and {tuple(other.shape)} differ.")
    if not one.numel():
        return 0.0
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).abs().max() / max(1.0, other.abs().max().item()))


def reference_layer(layer: nn.Module, num_dims: int) -> nn.Module:
    """Return PyTorch's layer with the eps and dtype of the given layer."""
    reference = torch_norms.builtin(FEATURES, num_dims, eps_of(layer))
    return reference.to(next((p.dtype for p in layer.parameters()), torch.float64))


def eps_of(layer: nn.Module) -> float:
    """Return the layer's eps, or 1e-5 if it has no such attribute."""
    return float(getattr(layer, "eps", 1e-5))


def normalized(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    """Return x normalized by its statistics over these axes."""
    var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) / (var + eps).sqrt()


def all_but_channels(num_dims: int) -> tuple[int, ...]:
    """Return the axes over which batch normalization computes its statistics."""
    return tuple(d for d in range(num_dims) if d != 1)
