"""The fast implementation, compared with the definition and PyTorch: results, precision, memory."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bn_lightning import BatchNorm
from bn_lightning.norms import definition, fast, registry
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
    statistics = []
    y = fast.normalize_batch(
        x, weight, bias, eps, track=lambda mean, var: statistics.extend((mean, var))
    )
    return y, *statistics


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_dims", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_eval_output_equals_the_definition(layout, num_dims, dtype):
    x = LAYOUTS[layout](scattered(SHAPES[num_dims], dtype))
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    arguments = torch.linspace(0.5, 2, 20, dtype=statistics).view(4, 5)
    expected = definition.normalize_with_running_stats(x, *arguments, 1e-3)
    found = fast.normalize_with_running_stats(x, *arguments, 1e-3)
    assert found.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(found, expected.to(dtype), rtol=tolerance, atol=tolerance)
    # In 3 dimensions, PyTorch's layer returns contiguous output too.
    if layout == "contiguous" or (layout == "channels last" and num_dims != 3):
        assert found.stride() == x.stride()


def test_second_derivative_of_synchronized_statistics_is_rejected():
    with pytest.raises(RuntimeError, match="supports neither second derivatives nor batched"):
        fast._gradients_in_plain_operations(SimpleNamespace(group="two processes"), torch.ones(2))


def backward(layer, x, gradient):
    x = x.detach().requires_grad_()
    y = layer(x)
    return y, *torch.autograd.grad(y, (x, layer.weight, layer.bias), gradient)


def functional(layer, x, gradient):
    def function(x, weight, bias):
        parameters = {"weight": weight, "bias": bias, "num_batches_tracked": torch.tensor(0)}
        return torch.func.functional_call(layer, parameters, (x,))

    layer.track_running_stats = not layer.training
    y, gradients = torch.func.vjp(function, x, layer.weight, layer.bias)
    return y, *gradients(gradient)


def compiled(layer, x, gradient):
    torch.compiler.reset()
    return backward(torch.compile(layer, backend="aot_eager"), x, gradient)


@pytest.mark.parametrize(
    "run", [backward, functional, pytest.param(compiled, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(256, 120), (32, 60, 12, 8)])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_a_large_mean_costs_no_more_precision_than_in_pytorchs_layer(run, training, shape, layout):
    """The formulas sum(x * dy) - mean * sum(dy) and E[x^2] - E[x]^2 fail this test."""
    channels, kind = shape[1], TORCH[len(shape)]
    torch.manual_seed(0)
    for offset in (0, 100, 10_000):
        x = LAYOUTS[layout](torch.randn(shape) + offset)
        gradient, weight = torch.randn(shape), torch.rand(channels) + 0.5
        results = {}
        for name, cls, dtype in (
            ("exact", kind, torch.float64),
            ("ours", BatchNorm, torch.float32),
            ("theirs", kind, torch.float32),
        ):
            layer = cls(channels, dtype=dtype).train(training)
            with torch.no_grad():
                layer.weight.copy_(weight)
                layer.running_mean.copy_(x.transpose(0, 1).flatten(1).mean(1))
            call = run if name == "ours" else backward
            results[name] = [
                t.detach().double() for t in call(layer, x.to(dtype), gradient.to(dtype))
            ]
        for exact, ours, theirs in zip(*results.values(), strict=True):
            error, their_error = ((v - exact).square().mean().sqrt() for v in (ours, theirs))
            # Plain operations sum in one step, which loses some digits of the batch mean.
            factor = 4 if run is backward else 20
            rounding = 4 * torch.finfo(torch.float32).eps * exact.abs().max()
            assert error <= factor * their_error + rounding, (offset, exact.shape)


@pytest.mark.parametrize("num_dims", SHAPES)
def test_output_is_right_in_every_order_of_dimensions_in_memory(num_dims):
    """A view of the output that is secretly a copy would leave it uninitialized."""
    x = scattered(SHAPES[num_dims], torch.float64)
    for order in itertools.permutations(range(num_dims)):
        back = [order.index(d) for d in range(num_dims)]
        reordered = x.permute(order).contiguous().permute(back)
        expanded = (reordered.narrow(d, 0, 1).expand_as(x) for d in range(num_dims))
        for values in (reordered, *expanded):
            for training in (True, False):
                layers = (BatchNorm(5).double().train(training), TORCH[num_dims](5).double())
                ours, theirs = (layer.train(training)(values) for layer in layers)
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
                assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("norm", ["custom", "renorm"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradient_of_an_evaluation_does_not_depend_on_later_training(norm, dtype):
    """PyTorch's layer uses the running statistics of the backward pass, and is wrong by 20%."""
    gradients = []
    for train_in_between in (False, True):
        layer = registry.make(norm, 5, 4).to(dtype)
        x = scattered(SHAPES[4], dtype).requires_grad_()
        y = layer.eval()(x)
        if train_in_between:
            layer.train()(x.detach())
        gradients.append(torch.autograd.grad(y.pow(3).sum(), (x, layer.weight, layer.bias)))
    for alone, with_training in zip(*gradients, strict=True):
        assert torch.equal(alone, with_training)


def test_bias_gradient_of_a_second_derivative_does_not_overflow_in_float16():
    x = torch.zeros(70_000, 2).half().requires_grad_()
    layer = BatchNorm(2)
    (gradient,) = torch.autograd.grad(layer(x).sum(), layer.bias, create_graph=True)
    assert gradient.tolist() == [70_000.0] * 2


@pytest.mark.parametrize(
    "shape", [(4, 0), (4, 0, 3, 2), (0, 0), (0, 5), (0, 5, 3, 2), (4, 5, 0, 2)]
)
@pytest.mark.parametrize("training", [True, False])
def test_empty_input_gives_empty_output_and_zero_gradients(shape, training):
    """PyTorch's layer raises an IndexError in training if there are no channels."""
    layer = BatchNorm(shape[1]).train(training)
    for layout in LAYOUTS.values():
        x = layout(torch.zeros(shape)).requires_grad_()
        y = layer(x)
        y.sum().backward()
        assert y.shape == x.grad.shape == shape
        assert not layer.weight.grad.any()
        assert not layer.running_mean.any()


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
