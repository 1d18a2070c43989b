"""The definition, compared with calculations by hand and with PyTorch's function."""

import pytest
import torch
from torch.nn import functional as F

from bn_lightning.norms import definition
from tests.support.norm_batches import SHAPES, scattered

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def test_algorithm_1_equals_a_calculation_by_hand():
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    weight, bias = torch.tensor([[2.0, 1.0], [10.0, 20.0]], dtype=torch.float64)
    y, mean, unbiased_var = definition.normalize_batch(x, weight, bias, eps=3)
    # The first channel has mean 2 and variance 1, and sqrt(1 + 3) is 2.
    assert y.tolist() == [[9.0, 20.0], [11.0, 20.0]]
    assert mean.tolist() == [2.0, 0.0]
    assert unbiased_var.tolist() == [2.0, 0.0]  # 2 / (m - 1)


@pytest.mark.parametrize("num_dims", SHAPES)
@pytest.mark.parametrize("affine", [True, False])
def test_output_and_gradients_equal_pytorchs(num_dims, affine):
    results = []
    for own in (True, False):
        x = scattered(SHAPES[num_dims], torch.float64).requires_grad_()
        weight, bias = (
            torch.linspace(start, 2, 5, dtype=torch.float64).requires_grad_() if affine else None
            for start in (0.5, 1)
        )
        if own:
            y, mean, var = definition.normalize_batch(x, weight, bias, 1e-3)
            assert not mean.requires_grad and not var.requires_grad
        else:
            mean, var = torch.zeros(5).double(), torch.ones(5).double()
            y = F.batch_norm(x, mean, var, weight, bias, True, momentum=1.0, eps=1e-3)
        leaves = [leaf for leaf in (x, weight, bias) if leaf is not None]
        results.append([y, mean, var, *torch.autograd.grad(y.pow(3).sum(), leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11 * theirs.abs().max().item())


def test_gradients_of_an_empty_batch_are_zero():
    weight = torch.ones(5, requires_grad=True)
    y, mean, var = definition.normalize_batch(torch.zeros(0, 5, 2, 2), weight, None, 1e-5)
    y.sum().backward()
    assert y.shape == (0, 5, 2, 2)
    for tensor in (mean, var, weight.grad):
        assert tensor.tolist() == [0.0] * 5


@pytest.mark.parametrize("momentum", [0.25, torch.tensor(0.25)])
def test_running_stats_move_towards_the_batch(momentum):
    running_mean, running_var = torch.tensor([0.0]), torch.tensor([1.0])
    mean, var = torch.tensor([[4.0], [9.0]], dtype=torch.float64)
    definition.update_running_stats(running_mean, running_var, mean, var, momentum)
    assert running_mean.tolist() == [1.0]  # 0.75 * 0 + 0.25 * 4
    assert running_var.tolist() == [3.0]  # 0.75 * 1 + 0.25 * 9
    assert running_mean.dtype == torch.float32


@pytest.mark.parametrize("num_dims", SHAPES)
@pytest.mark.parametrize("affine", [True, False])
def test_eval_output_equals_pytorchs(num_dims, affine):
    x = scattered(SHAPES[num_dims], torch.float64)
    mean, var, weight, bias = torch.linspace(0.5, 2, 20, dtype=torch.float64).view(4, 5)
    parameters = (weight, bias) if affine else (None, None)
    ours = definition.normalize_with_running_stats(x, mean, var, *parameters, 1e-3)
    theirs = F.batch_norm(x, mean, var, *parameters, eps=1e-3)
    torch.testing.assert_close(ours, theirs, **EXACT)


def test_helpers_return_counts_shapes_and_dtypes():
    x = torch.zeros(2, 3, 4, 5)
    assert definition.values_per_channel(x) == 2 * 4 * 5
    assert definition.per_channel(torch.zeros(3), x).shape == (1, 3, 1, 1)
    assert definition.at_least_float32(x) is x
    assert definition.at_least_float32(x.half()).dtype == torch.float32
    assert definition.at_least_float32(x.double()).dtype == torch.float64
