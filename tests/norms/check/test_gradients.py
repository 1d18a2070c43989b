"""Finite differences, and the diagnosis of a wrong gradient."""

import pytest
import torch
from torch.nn import functional as F

from bn_lightning.norms.check import gradients, probes


def test_slope_equals_the_derivative_along_the_directions():
    x, layer = torch.randn(4, 6).double(), torch.nn.Linear(6, 3).double()
    gradient = torch.randn(4, 3).double()
    directions = [torch.randn(t.shape).double() for t in (x, layer.weight, layer.bias)]
    y = directions[0] @ layer.weight.T + x @ directions[1].T + directions[2]
    expected = (y * gradient).sum().item()
    assert gradients.slope(layer, x, gradient, directions) == pytest.approx(expected, rel=1e-6)


def test_a_correct_gradient_has_no_missing_part():
    x = probes.batch(4).requires_grad_()
    gradient = probes.gradient_of(x.shape)
    (dx,) = torch.autograd.grad(F.batch_norm(x, None, None, training=True), x, gradient)
    assert gradients.missing_part(x.detach(), gradient, dx, 1e-5) == ""


@pytest.mark.parametrize(
    ("mean_is_detached", "note"),
    [
        (False, "No gradient flows through the variance."),
        (True, "No gradient flows through the mean and the variance."),
    ],
)
def test_a_detached_statistic_is_named(mean_is_detached, note):
    x = probes.batch(4).requires_grad_()
    gradient = probes.gradient_of(x.shape)
    mean = x.mean((0, 2, 3), keepdim=True)
    var = (x - mean).square().mean((0, 2, 3), keepdim=True).detach()
    if mean_is_detached:
        mean = mean.detach()
    y = (x - mean) / (var + 1e-5).sqrt()
    (dx,) = torch.autograd.grad(y, x, gradient)
    assert gradients.missing_part(x.detach(), gradient, dx, 1e-5) == note
