"""The gradient of a norm by finite differences, and what a wrong gradient misses."""

import copy

import torch
from torch import Tensor, nn

from bn_lightning.norms.check.probes import all_but_channels, difference


def slope(layer: nn.Module, x: Tensor, gradient: Tensor, directions: list[Tensor]) -> float:
    """Return the central difference of sum(y * gradient).

    `directions` says how the input and the parameters move.
    """

    def value(h: float) -> float:
        moved = copy.deepcopy(layer)
        with torch.no_grad():
            for p, d in zip(moved.parameters(), directions[1:], strict=True):
                p.add_(d.view_as(p), alpha=h)
        return float((moved(x + h * directions[0]) * gradient).sum().detach())

    return (value(1e-5) - value(-1e-5)) / 2e-5


def missing_part(x: Tensor, gradient: Tensor, dx: Tensor, eps: float) -> str:
    """Say which statistics dx, the gradient by the input, takes for constants.

    It is compared with that of batch normalization whose mean, variance or both are detached.
    """
    axes = all_but_channels(x.dim())
    for held in (("variance",), ("mean",), ("mean", "variance")):
        leaf = x.clone().requires_grad_()
        mean = leaf.mean(axes, keepdim=True)
        mean = mean.detach() if "mean" in held else mean
        var = (leaf - mean).square().mean(axes, keepdim=True)
        var = var.detach() if "variance" in held else var
        torch.autograd.backward((leaf - mean) / (var + eps).sqrt(), gradient)
        assert leaf.grad is not None
        if difference(dx, leaf.grad) < 1e-6:
            return f"no gradient flows through the {' and the '.join(held)}"
    return ""
