"""The layer and the function against torch's own test samples, errors included."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bn_lightning import BatchNorm, batch_norm

pytest.importorskip("expecttest", reason="torch's own samples need it (the test extra)")
try:
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db
except ImportError as error:
    pytest.skip(f"this torch has no samples of its own: {error}", allow_module_level=True)

# torch seeds and chooses device and dtype in its own way; these are the arguments that it calls its samples with.
LAYERS = {
    info.module_cls: info
    for info in module_db
    if "BatchNorm" in info.name and "Lazy" not in info.name
}
LAYERS = {layer: LAYERS[layer] for layer in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)}
OPERATIONS = {
    op.name: op for op in op_db if op.name in ("nn.functional.batch_norm", "native_batch_norm")
}
DTYPES = (torch.float64, torch.float32)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def close(ours, theirs, dtype, message=""):
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
    for layer, info in LAYERS.items():
        for dtype in DTYPES:
            for training in (True, False):
                torch.manual_seed(0)
                samples = info.module_inputs_func(info, "cpu", dtype, True, training)
                for number, sample in enumerate(samples):
                    yield pytest.param(
                        layer,
                        dtype,
                        training,
                        sample,
                        id=f"{layer.__name__}-{dtype}-{training}-{number}",
                    )


@pytest.mark.parametrize(("layer", "dtype", "training", "sample"), list(module_samples()))
def test_torchs_module_samples(layer, dtype, training, sample):
    arguments, keywords = sample.constructor_input.args, sample.constructor_input.kwargs
    theirs = layer(*arguments, **keywords, dtype=dtype).train(training)
    ours = BatchNorm(*arguments, **keywords, dtype=dtype).train(training)
    ours.load_state_dict(theirs.state_dict())
    for _ in range(2):
        results = []
        for module in (ours, theirs):
            module.zero_grad()
            x = sample.forward_input.args[0].detach().clone().requires_grad_()
            y = module(x)
            y.backward(torch.linspace(-1, 2, y.numel(), dtype=dtype).view_as(y))
            results.append([y, x.grad, *(p.grad for p in module.parameters())])
        for mine, its in zip(*results, strict=True):
            close(mine, its, dtype)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        close(ours.state_dict()[name].to(dtype), value.to(dtype), dtype, name)


def operation_samples():
    for name, operation in OPERATIONS.items():
        for dtype in DTYPES:
            torch.manual_seed(0)
            for number, sample in enumerate(
                operation.sample_inputs("cpu", dtype, requires_grad=True)
            ):
                yield pytest.param(name, dtype, sample, id=f"{name}-{dtype}-{number}")


@pytest.mark.parametrize(("name", "dtype", "sample"), list(operation_samples()))
def test_torchs_operation_samples(name, dtype, sample):
    results = []
    for function in (batch_norm, F.batch_norm):
        x, *tensors = (
            t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t
            for t in (sample.input, *sample.args)
        )
        if name == "native_batch_norm":  # which takes weight and bias first
            weight, bias, mean, var, *rest = tensors
            y = function(x, mean, var, weight, bias, *rest)
        else:
            mean, var, weight, bias = tensors
            y = function(x, mean, var, weight, bias, **sample.kwargs)
        y.backward(torch.linspace(-1, 2, y.numel(), dtype=dtype).view_as(y))
        results.append([y, x.grad, mean, var, *(t.grad for t in (weight, bias) if t is not None)])
    for mine, its in zip(*results, strict=True):
        assert (mine is None) == (its is None)
        if its is not None:
            close(mine, its, dtype)


def test_there_are_samples():
    assert len(list(module_samples())) >= 70
    assert len(list(operation_samples())) >= 40


def error_samples():
    for layer, info in LAYERS.items():
        for number, error in enumerate(
            info.module_error_inputs_func(
                info, "cpu", torch.float32, requires_grad=False, training=True
            )
        ):
            yield pytest.param(layer, error.module_error_input, id=f"{layer.__name__}-{number}")


@pytest.mark.parametrize(("layer", "sample"), list(error_samples()))
def test_torchs_error_samples(layer, sample):
    for module in (layer, BatchNorm):
        with pytest.raises((ValueError, RuntimeError)):
            module(*sample.constructor_input.args, **sample.constructor_input.kwargs)(
                *sample.forward_input.args
            )
