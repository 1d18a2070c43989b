"""The fast implementation, compared with the definition and PyTorch: results, precision, memory."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bn_lightning import BatchNorm, batch_norm
from bn_lightning.norms import definition, fast
from tests.support.norm_batches import LAYOUTS, SHAPES, TORCH, scattered


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_dims", SHAPES)
@pytest.mark.parametrize("parameters", ["", "weight", "bias", "weight bias"])
def test_output_statistics_and_derivatives_equal_the_definition(layout, num_dims, parameters):
    results = []
    for normalize in (definition.normalize_batch, fast_batch_norm):
        x = LAYOUTS[layout](scattered(SHAPES[num_dims], torch.float64)).requires_grad_()
        weight, bias = (
            torch.linspace(0.5, 2, 5, dtype=torch.float64).requires_grad_()
            if name in parameters
            else None
            for name in ("weight", "bias")
        )
        leaves = [leaf for leaf in (x, weight, bias) if leaf is not None]
        y, mean, var = normalize(x, weight, bias, 1e-3)
        first = torch.autograd.grad(y.pow(3).sum(), leaves, retain_graph=True)
        again = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in again), leaves)
        assert not mean.requires_grad and not var.requires_grad
        results.append([y, mean, var, *first, *again, *second])
    for expected, found in zip(*results, strict=True):
        atol = 1e-11 * expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=atol)


def fast_batch_norm(x, weight, bias, eps):
    return fast.FastBatchNorm.apply(x, weight, bias, eps, None)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_dims", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_eval_output_equals_the_definition(layout, num_dims, dtype):
    x = LAYOUTS[layout](scattered(SHAPES[num_dims], dtype))
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    arguments = torch.linspace(0.5, 2, 20, dtype=statistics).view(4, 5)
    expected = definition.normalize_with_running_stats(x, *arguments, 1e-3)
    found = fast.normalize_with_running_stats(x, *arguments, 1e-3)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    if layout in ("contiguous", "channels last"):
        assert found.stride() == x.stride()


def test_second_derivative_of_synchronized_statistics_is_rejected():
    x = torch.ones(2, 5)
    with pytest.raises(RuntimeError, match="Synchronized batch_norm does not support second"):
        fast._gradient_of_definition(SimpleNamespace(group="two processes"), x, None, x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_dims", SHAPES)
@pytest.mark.parametrize("training", [True, False])
def test_layer_equals_pytorchs_in_every_memory_layout(layout, num_dims, training):
    results = []
    for layer in (BatchNorm(5), TORCH[num_dims](5)):
        layer.double().train(training)
        x = LAYOUTS[layout](scattered(SHAPES[num_dims], torch.float64)).requires_grad_()
        y = layer(x)
        # The gradient is contiguous in each layout.
        y.backward(scattered(SHAPES[num_dims], torch.float64, seed=1))
        results.append((y, x.grad, layer.weight.grad, layer.bias.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    if layout in ("contiguous", "channels last"):
        assert results[0][0].stride() == x.stride()


@pytest.mark.parametrize("offset", [0, 10, 1000])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_float32_is_as_precise_as_pytorchs(offset, layout):
    """A mean that is large relative to the deviation makes naive variance formulas imprecise.

    The gradients of the weight in PyTorch's own two kernels differ in error by a factor up to 40.
    """
    torch.manual_seed(0)
    x, gradient = torch.randn(32, 6, 12, 12) + offset, torch.randn(32, 6, 12, 12)

    def run(function, dtype, layout):
        leaf = LAYOUTS[layout](x.to(dtype)).clone().requires_grad_()
        weight = torch.ones(6, dtype=dtype, requires_grad=True)
        bias = torch.zeros(6, dtype=dtype, requires_grad=True)
        y = function(leaf, None, None, weight, bias, True)
        y.backward(gradient.to(dtype))
        return [t.detach().double() for t in (y, leaf.grad, weight.grad, bias.grad)]

    exact = run(F.batch_norm, torch.float64, layout)
    ours = run(batch_norm, torch.float32, layout)
    theirs = [
        run(F.batch_norm, torch.float32, kernel) for kernel in ("contiguous", "channels last")
    ]
    for number, truth in enumerate(exact):
        error = (ours[number] - truth).abs().max()
        their_error = max((results[number] - truth).abs().max() for results in theirs)
        assert error <= 2 * their_error + 1e-6 * truth.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_saves_no_more_for_the_backward_pass_than_pytorch(dtype, layout):
    x = LAYOUTS[layout](scattered((8, 5, 6, 4), dtype)).requires_grad_()
    assert bytes_saved(BatchNorm(5), x) <= bytes_saved(nn.BatchNorm2d(5), x)


def bytes_saved(layer, x):
    storages = {}

    def pack(t):
        storage = t.untyped_storage()
        return storages.setdefault(storage.data_ptr(), storage.nbytes())

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        layer(x)
    return sum(storages.values())
