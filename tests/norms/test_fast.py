"""The fast implementation against the definition and against torch: results, precision, memory."""

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
def test_is_the_definition(layout, num_dims, parameters):
    """Output, statistics, and derivatives of first and second order."""
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
def test_evaluation_is_the_definition(layout, num_dims, dtype):
    x = LAYOUTS[layout](scattered(SHAPES[num_dims], dtype))
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    arguments = torch.linspace(0.5, 2, 20, dtype=statistics).view(4, 5)
    expected = definition.normalize_with_running_stats(x, *arguments, 1e-3)
    found = fast.normalize_with_running_stats(x, *arguments, 1e-3)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    if layout in ("contiguous", "channels last"):
        assert found.stride() == x.stride()


def test_second_derivative_across_processes_is_refused():
    x = torch.ones(2, 5)
    with pytest.raises(RuntimeError, match="across processes has no second derivative"):
        fast._gradient_of_definition(SimpleNamespace(group="two processes"), x, None, x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_dims", SHAPES)
@pytest.mark.parametrize("training", [True, False])
def test_layouts(layout, num_dims, training):
    results = []
    for layer in (BatchNorm(5), TORCH[num_dims](5)):
        layer.double().train(training)
        x = LAYOUTS[layout](scattered(SHAPES[num_dims], torch.float64)).requires_grad_()
        y = layer(x)
        y.backward(
            scattered(SHAPES[num_dims], torch.float64, seed=1)
        )  # contiguous whatever the layout
        results.append((y, x.grad, layer.weight.grad, layer.bias.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    if layout in ("contiguous", "channels last"):
        assert results[0][0].stride() == x.stride()


@pytest.mark.parametrize("offset", [0, 10, 1000])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_float32_is_as_exact_as_torchs(offset, layout):
    """Also where the mean is large beside the deviation, which is where formulas for the variance fail.

    torch's own two kernels differ by up to 40 times in the error of the gradient by the weight.
    """
    torch.manual_seed(0)
    x, gradient = torch.randn(32, 6, 12, 12) + offset, torch.randn(32, 6, 12, 12)

    def run(function, dtype, layout):
        leaf = LAYOUTS[layout](x.to(dtype)).clone().requires_grad_()
        weight, bias = (
            torch.ones(6, dtype=dtype, requires_grad=True),
            torch.zeros(6, dtype=dtype, requires_grad=True),
        )
        y = function(leaf, None, None, weight, bias, True)
        y.backward(gradient.to(dtype))
        return [t.detach().double() for t in (y, leaf.grad, weight.grad, bias.grad)]

    exact = run(F.batch_norm, torch.float64, layout)
    ours = run(batch_norm, torch.float32, layout)
    torchs = [
        run(F.batch_norm, torch.float32, its_layout)
        for its_layout in ("contiguous", "channels last")
    ]
    for number, truth in enumerate(exact):
        error = (ours[number] - truth).abs().max()
        allowed = max((its[number] - truth).abs().max() for its in torchs)
        assert error <= 2 * allowed + 1e-6 * truth.abs().max()


def test_keeps_no_more_for_the_backward_pass_than_torch():
    def kept(layer, x):
        storages = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: storages.setdefault(
                t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()
            ),
            lambda t: t,
        ):
            layer(x)
        return sum(storages.values())

    for dtype in (torch.float32, torch.bfloat16):
        for layout in ("contiguous", "channels last"):
            x = LAYOUTS[layout](scattered((8, 5, 6, 4), dtype)).requires_grad_()
            assert kept(BatchNorm(5), x) <= kept(nn.BatchNorm2d(5), x)
