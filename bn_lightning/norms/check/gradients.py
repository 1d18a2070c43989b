"""Finite differences of a norm, and the diagnosis of a wrong gradient."""

import copy

import torch
from torch import Tensor, nn

from bn_lightning.norms.check.probes import all_but_channels, difference


def slope(layer: nn.Module, x: Tensor, gradient: Tensor, directions: list[Tensor]) -> float:
    """Return the slope of sum(y * gradient), as a central difference.

    Args:
        x: the input. y is the layer's output for it.
        gradient: the weights of the sum, with the shape of y.
        directions: the directions in which x and the parameters move, one tensor for
            each.
    """

    def value(h: float) -> float:
        moved = copy.deepcopy(layer)
        with torch.no_grad():
            for p, d in zip(moved.parameters(), directions[1:], strict=True):
                p.add_(d.view_as(p), alpha=h)
        return float((moved(x + h * directions[0]) * gradient).sum().detach())

    return (value(1e-5) - value(-1e-5)) / 2e-5


def missing_part(x: Tensor, gradient: Tensor, dx: Tensor, eps: float) -> str:
    """Return which statistics a gradient treats as constants, or "" if none.

    `dx`, the gradient with respect to the input, is compared with the gradients of
    batch normalization whose mean, variance or both are detached.
    """
    axes = all_but_channels(x.dim())
    for detached in (("variance",), ("mean",), ("mean", "variance")):
        leaf = x.clone().requires_grad_()
        mean = leaf.mean(axes, keepdim=True)
        mean = mean.detach() if "mean" in detached else mean
        var = (leaf - mean).square().mean(axes, keepdim=True)
        var = var.detach() if "variance" in detached else var
        torch.autograd.backward((leaf - mean) / (var + eps).sqrt(), gradient)
        assert leaf.grad is not None
        if difference(dx, leaf.grad) < 1e-6:
            return f"No gradient flows through the {' and the '.join(detached)}."
    return ""
