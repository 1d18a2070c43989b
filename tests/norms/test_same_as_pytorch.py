"""One comparison with PyTorch's layer: operation x dimensions x dtype x memory layout x mode.

An operation turns a layer into a module that uses it. With PyTorch's layer and with ours, that
module must have the same output, memory format, gradients, running statistics and counter. The
exact values are those of PyTorch's layer in float64.
"""

import copy
import itertools
import pickle
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import fusion, parameters_to_vector, parametrize, vector_to_parameters
from torch.utils.checkpoint import checkpoint

from bn_lightning import BatchNorm
from tests.support.norm_batches import LAYOUTS, SHAPES, TORCH, scattered

# The dtype of the input, and that of parameters and running statistics.
DTYPES = {
    "float64": (torch.float64, torch.float64),
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "bfloat16 input": (torch.bfloat16, torch.float32),
    "float16 input": (torch.float16, torch.float32),
}
VIEWS = LAYOUTS | {
    "expanded": lambda x: x[:, :1].expand_as(x),
    "sliced": lambda x: LAYOUTS["channels last"](torch.cat([x, x], 1))[:, :5],
    "empty": lambda x: x[:0],
}


class Use(nn.Module):
    """Calls function(layer, x)."""

    def __init__(self, function, layer):
        super().__init__()
        self.function, self.layer = function, layer

    def forward(self, x):
        return self.function(self.layer, x)


def use(function):
    return partial(Use, function)


def change(**values):
    """Set attributes. A callable computes the new value from the layer."""

    def operation(layer):
        for name, value in values.items():
            setattr(layer, name, value(layer) if callable(value) else value)
        return layer

    return operation


def train_then_eval(layer, x):
    training = layer.training
    y = layer.train()(x) + layer.eval()(x)
    layer.train(training)
    return y


def with_hooks(layer):
    layer.register_forward_pre_hook(lambda layer, inputs: (inputs[0] * 2,))
    layer.register_forward_hook(lambda layer, inputs, y: y * 3)
    layer.register_full_backward_hook(lambda layer, grad_in, grad_out: (grad_in[0] * 4,))
    layer.weight.register_hook(lambda gradient: gradient * 5)
    return layer


def doubled_as_vector(layer):
    vector_to_parameters(parameters_to_vector(layer.parameters()) * 2, layer.parameters())
    return layer


def fused(layer, x):
    torch.manual_seed(0)
    if x.dim() == 2:
        linear = nn.Linear(5, 5, dtype=layer.weight.dtype).eval()
        return fusion.fuse_linear_bn_eval(linear, layer)(x)
    convolution = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[x.dim()]
    convolution = convolution(5, 5, 1).to(layer.weight.dtype).eval()
    return fusion.fuse_conv_bn_eval(convolution, layer)(x)


def autocast(layer, x):
    with torch.autocast("cpu", torch.bfloat16):
        return layer(x)


def compiled(layer, x):
    if not isinstance(layer, BatchNorm):
        return layer(x)
    torch.compiler.reset()
    return torch.compile(layer, backend="aot_eager", fullgraph=True)(x)


def exported(layer, x):
    if not isinstance(layer, BatchNorm):
        return layer(x)
    return torch.export.export(layer, (x,)).module()(x)


without_statistics = change(running_mean=None, running_var=None)
OPERATIONS = {
    "call": lambda layer: layer,
    # In-place operations on the output, and on the input after the call.
    "relu": use(lambda f, x: F.relu(f(x), inplace=True)),
    "hardswish": use(lambda f, x: F.hardswish(f(x), inplace=True)),
    "silu": use(lambda f, x: F.silu(f(x), inplace=True)),
    "dropout": use(lambda f, x: F.dropout(f(x), 1.0, inplace=True)),
    "residual": use(lambda f, x: f(x).add_(x).relu_()),
    "masked": use(lambda f, x: f(x).masked_fill_(x > 0, 0.5)),
    "indexed": use(lambda f, x: f(x).index_fill_(1, torch.tensor([2]), 0.5)),
    # Ways to run a layer.
    "checkpoint": use(partial(checkpoint, use_reentrant=False)),
    "reentrant checkpoint": use(partial(checkpoint, use_reentrant=True)),
    "checkpoint in a block": use(
        lambda f, x: checkpoint(lambda x: f(x).exp(), x, use_reentrant=False)
    ),
    "two batches": use(lambda f, x: f(x) + f(x.square())),
    "train then eval": use(train_then_eval),
    "autocast": use(autocast),
    "functional_call": use(lambda f, x: functional_call(f, {"bias": f.weight.exp()}, (x,))),
    "vmap": use(lambda f, x: vmap(without_statistics(f))(torch.stack([x, x.exp()])).sum(0)),
    "grad": use(lambda f, x: grad(lambda x: without_statistics(f)(x).pow(3).sum())(x)),
    "gradient per batch": use(
        lambda f, x: vmap(grad(lambda x: without_statistics(f)(x).pow(3).sum()))(
            torch.stack([x, x / 2])
        ).sum(0)
    ),
    "input without gradient": use(lambda f, x: f(x.detach())),
    "distributed": DistributedDataParallel,
    "fused": use(fused),
    "compiled": use(compiled),
    "exported": use(exported),
    # Changes of a layer.
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "hooks": with_hooks,
    "parameter vector": doubled_as_vector,
    "parametrization": lambda layer: parametrize.register_parametrization(
        layer, "weight", Use(lambda _, weight: weight.exp(), None)
    ),
    "frozen": lambda layer: layer.requires_grad_(False),
    "frozen gamma": change(weight=lambda layer: nn.Parameter(layer.weight, requires_grad=False)),
    "shared parameter": change(bias=lambda layer: layer.weight),
    "new parameter": change(weight=lambda layer: nn.Parameter(layer.bias.exp())),
    "no gamma": change(weight=None),
    "no beta": change(bias=None),
    "new buffer": change(running_var=lambda layer: layer.running_mean.exp()),
    "no running statistics": without_statistics,
    "no counter": change(num_batches_tracked=None),
    "statistics kept": change(track_running_stats=False),
    "momentum 0": change(momentum=0),
    "momentum 1": change(momentum=1.0),
    "mean of 100,000": change(
        momentum=None, num_batches_tracked=lambda layer: torch.tensor(99_999)
    ),
}
SLOW = ("compiled", "exported")


def results(kind, operation, num_dims, dtype, view, training, exact=False):
    """Return output, gradients and buffers, by name."""
    input_dtype, layer_dtype = DTYPES[dtype]
    state = torch.linspace(0.5, 2, 20).view(4, 5).to(layer_dtype)
    x, gradient = (scattered(SHAPES[num_dims], input_dtype, seed) / 4 for seed in (0, 1))
    if exact:
        x, gradient, state = x.double(), gradient.double(), state.double()
    layer = kind(5, dtype=state.dtype).train(training)
    with torch.no_grad():
        for tensor, values in zip((*layer.parameters(), *layer.buffers()), state, strict=False):
            tensor.copy_(values)
    used = OPERATIONS[operation](layer)
    x = VIEWS[view](x).requires_grad_()
    y = used(x)
    y.backward(gradient[: len(y)].to(y.dtype))
    gradients = {f"d {name}": p.grad for name, p in used.named_parameters()}
    return {"y": y, "d x": x.grad, **gradients, **dict(used.named_buffers())}


@pytest.fixture(scope="module", autouse=True)
def one_process():
    """Start a process group of one process, for DistributedDataParallel."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def cases():
    """Return the cases: each dtype in 4 dimensions, and float64 in the others.

    The quick suite has two operations with all dtypes, and fewer dtypes of the others.
    """
    for case in itertools.product(OPERATIONS, SHAPES, DTYPES):
        operation, num_dims, dtype = case
        if num_dims != 4 and dtype != "float64" and operation not in ("call", "relu"):
            continue
        quick = num_dims == 4 and dtype in ("float64", "float32", "bfloat16 input")
        quick = operation in ("call", "relu") or (quick and operation not in SLOW)
        yield pytest.param(*case, marks=[] if quick else [pytest.mark.slow])


@pytest.mark.parametrize(("operation", "num_dims", "dtype"), [*cases()])
def test_results_equal_those_of_pytorchs_layer(operation, num_dims, dtype):
    if operation in ("fused", "vmap", "gradient per batch") and len({*DTYPES[dtype]}) == 2:
        pytest.skip("PyTorch's layer raises, or returns the wrong dtype")
    compared = 0
    for view, training in itertools.product(VIEWS, (True, False)):
        if operation in SLOW and view not in ("contiguous", "channels last"):
            continue
        case = (operation, num_dims, dtype, view, training)
        try:
            theirs = results(TORCH[num_dims], *case)
        except (RuntimeError, AssertionError):
            # A gradient by torch.func in training, for example, and fusion in training.
            continue
        ours, exact = results(BatchNorm, *case), theirs
        if dtype != "float64":
            exact = results(TORCH[num_dims], *case, exact=True)
        assert_as_precise(ours, theirs, exact, case)
        if operation not in ("grad", "gradient per batch"):
            assert ours["y"].stride() == theirs["y"].stride(), case
        compared += 1
    assert compared >= 2


def assert_as_precise(ours, theirs, exact, case):
    """Assert that no error of ours is larger than four times that of theirs, except by rounding.

    Rounding is relative to the largest value, or to that of all gradients.
    """
    assert ours.keys() == theirs.keys()
    gradients = [v for name, v in exact.items() if name.startswith("d ") and v is not None]
    for name, their_value in theirs.items():
        our_value, exact_value = ours[name], exact[name]
        if their_value is None or not their_value.is_floating_point():
            assert str(our_value) == str(their_value), (case, name)
            continue
        assert (our_value.dtype, our_value.shape) == (their_value.dtype, their_value.shape)
        if not exact_value.numel():
            continue
        errors = ((v.double() - exact_value).abs().max() for v in (our_value, their_value))
        error, their_error = errors
        comparable = gradients if name.startswith("d ") else [exact_value]
        largest = max(v.abs().max() for v in comparable if v.numel())
        epsilon = torch.finfo(their_value.dtype).eps
        rounding = largest * (1e-12 if their_value.dtype == torch.float64 else 16 * epsilon)
        assert error <= 4 * their_error + rounding, (case, name)
