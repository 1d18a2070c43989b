"""The helpers of the checks."""

import pytest
import torch
from torch import nn

from bn_lightning.norms.check import probes


def test_difference_is_relative_to_the_largest_value_above_1():
    one = torch.tensor([1.0, 2.0])
    assert probes.difference(one, one) == 0
    assert probes.difference(one, one + 1) == pytest.approx(1 / 3)  # the largest value is 3
    assert probes.difference(one / 10, one / 5) == pytest.approx(0.2)  # all values are below 1
    assert probes.difference([one, one], [one, one + 1]) == pytest.approx(1 / 3)
    assert probes.difference(torch.zeros(0), torch.zeros(0)) == 0
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(3,\) differ"):
        probes.difference(one, torch.zeros(3))


@pytest.mark.parametrize("num_dims", probes.SHAPES)
def test_step_returns_output_and_gradients(num_dims):
    x = probes.batch(num_dims)
    layer = probes.make_layer("builtin", {}, num_dims).double()
    y, dx, *by_parameters = probes.step(layer, x)
    assert y.shape == dx.shape == x.shape
    axes = probes.all_but_channels(num_dims)
    torch.testing.assert_close(by_parameters[1], probes.gradient_of(x.shape).sum(axes))
    torch.testing.assert_close(y, probes.normalized(x, axes, 1e-5))


@pytest.mark.parametrize(("num_dims", "kind"), [(2, nn.BatchNorm1d), (4, nn.BatchNorm2d)])
def test_reference_layer_has_the_eps_and_dtype_of_the_layer(num_dims, kind):
    layer = probes.make_layer("custom", {"eps": 0.25}, num_dims).double()
    reference = probes.reference_layer(layer, num_dims)
    assert type(reference) is kind
    assert (reference.eps, reference.weight.dtype) == (0.25, torch.float64)
    assert probes.eps_of(nn.Identity()) == 1e-5


def test_in_eval_does_not_change_the_layer():
    layer, x = probes.make_layer("builtin", {}, 4).double(), probes.batch(4)
    assert probes.after_many_steps(layer, x, steps=3) is layer
    y = probes.in_eval(layer, x)
    assert layer.training and layer.num_batches_tracked == 3
    assert not y.requires_grad
