"""The layer and the function, run on PyTorch's own test samples, including its error samples."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bn_lightning import BatchNorm, batch_norm

pytest.importorskip("expecttest", reason="PyTorch's test samples need it (extra `test`)")
try:
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db
except ImportError as error:
    pytest.skip(f"this build of PyTorch has no test samples: {error}", allow_module_level=True)

CLASSES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
LAYERS = {info.module_cls: info for info in module_db if info.module_cls in CLASSES}
OPERATIONS = {
    op.name: op for op in op_db if op.name in ("nn.functional.batch_norm", "native_batch_norm")
}
DTYPES = (torch.float64, torch.float32)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def assert_close(ours, theirs, dtype, message=""):
    scale = theirs.detach().abs().max().item() if theirs.numel() else 1.0
    torch.testing.assert_close(
        ours,
        theirs,
        rtol=TOLERANCE[dtype],
        atol=TOLERANCE[dtype] * max(scale, 1),
        equal_nan=True,
        msg=message or None,
    )


def module_samples():
    for layer, dtype, training in itertools.product(LAYERS, DTYPES, (True, False)):
        info = LAYERS[layer]
        torch.manual_seed(0)
        samples = info.module_inputs_func(info, "cpu", dtype, True, training)
        for number, sample in enumerate(samples):
            id = f"{layer.__name__}-{dtype}-{training}-{number}"
            yield pytest.param(layer, dtype, training, sample, id=id)


@pytest.mark.parametrize(("layer", "dtype", "training", "sample"), list(module_samples()))
def test_layer_equals_pytorchs_on_its_module_samples(layer, dtype, training, sample):
    arguments, keywords = sample.constructor_input.args, sample.constructor_input.kwargs
    reference = layer(*arguments, **keywords, dtype=dtype).train(training)
    own = BatchNorm(*arguments, **keywords, dtype=dtype).train(training)
    own.load_state_dict(reference.state_dict())
    for _ in range(2):
        results = []
        for module in (own, reference):
            module.zero_grad()
            x = sample.forward_input.args[0].detach().clone().requires_grad_()
            y = module(x)
            y.backward(torch.linspace(-1, 2, y.numel(), dtype=dtype).view_as(y))
            results.append([y, x.grad, *(p.grad for p in module.parameters())])
        for ours, theirs in zip(*results, strict=True):
            assert_close(ours, theirs, dtype)
    own_state, reference_state = own.state_dict(), reference.state_dict()
    assert own_state.keys() == reference_state.keys()
    for name, theirs in reference_state.items():
        assert_close(own_state[name].to(dtype), theirs.to(dtype), dtype, name)


def operation_samples():
    for name, operation in OPERATIONS.items():
        for dtype in DTYPES:
            torch.manual_seed(0)
            samples = operation.sample_inputs("cpu", dtype, requires_grad=True)
            for number, sample in enumerate(samples):
                yield pytest.param(name, dtype, sample, id=f"{name}-{dtype}-{number}")


@pytest.mark.parametrize(("name", "dtype", "sample"), list(operation_samples()))
def test_function_equals_pytorchs_on_its_operation_samples(name, dtype, sample):
    results = []
    for function in (batch_norm, F.batch_norm):
        x, *tensors = (
            t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t
            for t in (sample.input, *sample.args)
        )
        if name == "native_batch_norm":
            # Its arguments start with weight and bias.
            weight, bias, mean, var, *rest = tensors
            y = function(x, mean, var, weight, bias, *rest)
        else:
            mean, var, weight, bias = tensors
            y = function(x, mean, var, weight, bias, **sample.kwargs)
        y.backward(torch.linspace(-1, 2, y.numel(), dtype=dtype).view_as(y))
        results.append([y, x.grad, mean, var, *(t.grad for t in (weight, bias) if t is not None)])
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            assert_close(ours, theirs, dtype)


def test_pytorch_provides_enough_samples():
    assert len(list(module_samples())) >= 70
    assert len(list(operation_samples())) >= 40


def error_samples():
    for layer, info in LAYERS.items():
        # These are the arguments with which PyTorch's own tests call the function.
        errors = info.module_error_inputs_func(
            info, "cpu", torch.float32, requires_grad=False, training=True
        )
        for number, error in enumerate(errors):
            yield pytest.param(layer, error.module_error_input, id=f"{layer.__name__}-{number}")


@pytest.mark.parametrize(("layer", "sample"), list(error_samples()))
def test_layer_rejects_pytorchs_error_samples(layer, sample):
    constructor, forward = sample.constructor_input, sample.forward_input
    for module in (layer, BatchNorm):
        with pytest.raises((ValueError, RuntimeError)):
            module(*constructor.args, **constructor.kwargs)(*forward.args)
