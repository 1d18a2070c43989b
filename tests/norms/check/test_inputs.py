"""Random inputs, and differences in which NaN never passes."""

import pytest
import torch
from torch import nn

from bn_lightning.norms.check import inputs

NAN = float("nan")


def test_difference_is_relative_to_the_largest_value_above_1():
    one = torch.tensor([1.0, 2.0])
    assert inputs.difference(one, one) == 0
    assert inputs.difference(one, one + 1) == pytest.approx(1 / 3)  # the largest value is 3
    assert inputs.difference(one / 10, one / 5) == pytest.approx(0.2)  # all values are below 1
    assert inputs.difference([one, one], [one, one + 1]) == pytest.approx(1 / 3)
    assert inputs.difference({"a": one}, {"a": one}) == 0
    assert inputs.difference(torch.zeros(0), torch.zeros(0)) == 0


def test_what_cannot_be_compared_differs():
    one = torch.ones(2)
    for other in (torch.ones(3), torch.ones(2, 1), torch.full((2,), torch.inf)):
        assert not inputs.difference(one, other) <= 1e300
    assert inputs.difference({"a": one}, {"b": one}) == torch.inf
    assert inputs.difference([one], [one, one]) == torch.inf


@pytest.mark.parametrize("values", [[NAN, 0.0], [0.0, NAN], [1.0, NAN, 2.0]])
def test_nan_is_never_lost(values):
    """`max(0.0, nan)` is 0.0, and `min(0.0, nan)` too."""
    assert torch.tensor(inputs.largest(values)).isnan()
    assert torch.tensor(inputs.smallest(values)).isnan()
    tensors = [torch.tensor(v) for v in values]
    assert not inputs.difference(tensors, [torch.zeros(())] * len(values)) <= 1e300


def test_largest_and_smallest_of_numbers():
    assert (inputs.largest([1.0, 3.0, 2.0]), inputs.smallest([2.0, 1.0, 3.0])) == (3.0, 1.0)
    assert inputs.largest([]) == 0


def test_parameters_move_to_both_signs_and_away_from_their_initial_values():
    layer = nn.GroupNorm(2, 8)
    inputs.randomize_parameters(layer, 3)
    for parameter, initial in ((layer.weight, 1), (layer.bias, 0)):
        assert ((parameter - initial).abs() > 0.3).all()
    assert (layer.weight < 0).sum() == 4


def test_step_returns_the_gradients_of_backward():
    layer = nn.BatchNorm1d(6).double()
    x, g = inputs.batch((9, 6)), inputs.random((9, 6), 1)
    found = inputs.step(layer, x, g)
    assert list(found) == ["output", "input", "weight", "bias"]
    torch.testing.assert_close(found["bias"], g.sum(0))
    layer.weight.requires_grad_(False)
    assert list(inputs.step(layer, x, g)) == ["output", "input", "bias"]


def test_evaluate_keeps_the_mode_and_the_state():
    layer, x = nn.BatchNorm1d(6).double(), inputs.batch((9, 6))
    y = inputs.evaluate(layer, x)
    assert layer.training and layer.num_batches_tracked == 0 and not y.requires_grad
    torch.testing.assert_close(y, x / (1 + 1e-5) ** 0.5)
