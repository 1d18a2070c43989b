"""The function and the layer, compared with PyTorch's: results, derivatives, transforms, state."""

import copy
import inspect
import io
import pickle
import shutil

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from bn_lightning import BatchNorm, batch_norm
from tests.support.norm_batches import SHAPES, TORCH, scattered

# Forward-mode derivatives make PyTorch import a module of its own that uses torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


@pytest.mark.parametrize("num_dims", SHAPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_function_equals_pytorchs(num_dims, training, affine, dtype, tolerance):
    x = scattered(SHAPES[num_dims], dtype)
    results = []
    for function in (batch_norm, F.batch_norm):
        mean, var = torch.linspace(-1, 1, 5, dtype=dtype), torch.linspace(0.5, 2, 5, dtype=dtype)
        weight = torch.linspace(0.5, 1.5, 5, dtype=dtype).requires_grad_() if affine else None
        bias = torch.linspace(1, 2, 5, dtype=dtype).requires_grad_() if affine else None
        leaf = x.clone().requires_grad_()
        y = function(leaf, mean, var, weight, bias, training, 0.3, 1e-3)
        factors = torch.linspace(0, 1, y.numel(), dtype=dtype).view_as(y)
        y.square().mul(factors).sum().backward()
        results.append([y, mean, var, leaf.grad, *((weight.grad, bias.grad) if affine else ())])
    for ours, theirs in zip(*results, strict=True):
        atol = tolerance * theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=atol)


@pytest.mark.parametrize("num_dims", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_half_precision_input_is_computed_in_float32(num_dims, dtype, training):
    x = scattered(SHAPES[num_dims], dtype)
    ours, theirs = BatchNorm(5).train(training), TORCH[num_dims](5).train(training)
    y = ours(x)
    assert y.dtype == dtype
    mean, var = torch.zeros(5).double(), torch.ones(5).double()
    exact = F.batch_norm(x.double(), mean, var, training=training)
    # The only error is the rounding of the result: half a unit in the last place.
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps / 2 * 1.01, atol=1e-5)
    theirs(x)
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_dims", SHAPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},
        {"momentum": 0.7, "eps": 0.1},
        {"affine": False},
        {"bias": False},
        {"track_running_stats": False},
    ],
)
def test_layer_equals_pytorchs_over_several_steps(num_dims, options):
    if not options.keys() <= inspect.signature(TORCH[num_dims]).parameters.keys():
        pytest.skip(f"the layer of PyTorch {torch.__version__} has no argument {list(options)}")
    ours, theirs = BatchNorm(5, **options), TORCH[num_dims](5, **options)
    ours.load_state_dict(theirs.state_dict())
    for seed in range(3):
        x = scattered(SHAPES[num_dims], seed=seed)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    theirs.load_state_dict(ours.state_dict())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    x = scattered(SHAPES[num_dims], seed=9)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_dims", SHAPES)
def test_first_second_and_forward_mode_derivatives_match_finite_differences(num_dims):
    shape = (2, 3, 2, 2, 2)[:num_dims] if num_dims > 2 else (4, 3)
    x = scattered(shape, torch.float64).requires_grad_()
    weight = torch.linspace(0.5, 1.5, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.linspace(-1, 1, 3, dtype=torch.float64, requires_grad=True)

    def function(x, weight, bias):
        return batch_norm(x, None, None, weight, bias, True)

    inputs = (x, weight, bias)
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True)


needs_compiler = pytest.mark.skipif(
    not shutil.which("g++"), reason="torch.compile needs a C++ compiler"
)


# The backend `inductor` compiles C++ code. The other one only traces the graph.
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=[needs_compiler, pytest.mark.slow])]
)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiles_in_one_graph_with_equal_results(momentum, backend):
    layer = BatchNorm(5, momentum=momentum)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend=backend)
    for mode in (True, False):
        x = scattered((8, 5, 6, 4))
        results = []
        for module in (layer.train(mode), compiled.train(mode)):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            y.pow(3).sum().backward()
            results.append((y, leaf.grad))
        for eager, theirs in zip(*results, strict=True):
            torch.testing.assert_close(theirs, eager, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.running_var, compiled.running_var)


@pytest.mark.parametrize("training", [True, False])
def test_exported_program_with_dynamic_batch_equals_the_layer(training):
    layer = BatchNorm(5).train(training)
    x = scattered((8, 5, 6, 4))
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(copy.deepcopy(layer), (x,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(x[:3]), copy.deepcopy(layer)(x[:3]))


def test_copies_pickles_and_checkpoints_give_the_same_output():
    layer = BatchNorm(5, momentum=None, num_dims=4)
    layer(scattered((8, 5, 6, 4)))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    restored = BatchNorm(5, momentum=None)
    restored.load_state_dict(torch.load(file, weights_only=True))
    x = scattered((8, 5, 6, 4), seed=1)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), restored):
        assert torch.equal(other.eval()(x), layer.eval()(x))


def test_state_of_pytorch_0_4_0_loads():
    """Its layers had no num_batches_tracked, and no version in their state dict."""
    for layer in (BatchNorm(5), nn.BatchNorm2d(5)):
        state = layer.state_dict()
        del state["num_batches_tracked"]
        del state._metadata
        layer.load_state_dict(state)
    state = BatchNorm(5).state_dict()
    del state["num_batches_tracked"]
    for layer in (BatchNorm(5), nn.BatchNorm2d(5)):
        with pytest.raises(RuntimeError, match="num_batches_tracked"):
            layer.load_state_dict(state)


def test_old_state_is_assigned_to_a_layer_on_the_meta_device():
    state = nn.BatchNorm2d(5).state_dict()
    del state["num_batches_tracked"]
    del state._metadata
    layer = BatchNorm(5, device="meta")
    layer.load_state_dict(state, assign=True)
    assert layer.num_batches_tracked.item() == 0


@pytest.mark.parametrize("training", [True, False])
def test_traced_graph_has_the_output_of_the_layer(training):
    layer, x = BatchNorm(5).train(training), scattered((8, 5, 6, 4))
    traced = make_fx(copy.deepcopy(layer))(x)
    torch.testing.assert_close(traced(x), copy.deepcopy(layer)(x))


def test_running_variance_that_overflows_is_infinite():
    x = torch.randn(64, 5).half() * 1000
    for layer in (BatchNorm(5).half(), nn.BatchNorm1d(5).half()):
        for _ in range(20):
            layer(x)
        assert layer.running_var.isinf().all()


def test_layer_on_the_meta_device_equals_a_new_layer_after_reset():
    layer = BatchNorm(5, device="meta")
    x = torch.empty(8, 5, 6, 4, device="meta").to(memory_format=torch.channels_last)
    x.requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert (y.shape, y.stride(), y.device.type) == (x.shape, x.stride(), "meta")
    assert x.grad.shape == x.shape
    layer.to_empty(device="cpu").reset_parameters()
    for name, value in nn.BatchNorm2d(5).state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("momentum", "first"),
    [(0.1, 0), (None, 0), pytest.param(None, 65_000, marks=pytest.mark.slow)],
)
def test_running_statistics_of_many_batches_are_as_precise_as_pytorchs(dtype, momentum, first):
    """float16 cannot represent 65,536 batches, and bfloat16 cannot represent 257."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(100, 8, 3, generator=generator) * 2 + torch.tensor([-1.0, 3.0, 10.0])
    inputs = inputs.to(dtype)
    ours, theirs, exact = layers = (
        BatchNorm(3, momentum=momentum, dtype=dtype),
        nn.BatchNorm1d(3, momentum=momentum, dtype=dtype),
        nn.BatchNorm1d(3, momentum=momentum, dtype=torch.float64),
    )
    for layer in layers:
        layer.num_batches_tracked.fill_(first)
    with torch.no_grad():
        for number in range(1000):
            x = inputs[number % 100]
            for layer in layers:
                layer(x.to(layer.weight.dtype))
    assert ours.num_batches_tracked == theirs.num_batches_tracked == first + 1000
    for name in ("running_mean", "running_var"):
        truth = getattr(exact, name)
        error, their_error = (
            (getattr(layer, name).double() - truth).abs().max() for layer in (ours, theirs)
        )
        assert error <= 2 * their_error + 4 * torch.finfo(dtype).eps * truth.abs().max(), name


def test_output_of_a_new_layer_has_zero_mean_and_unit_variance():
    y = BatchNorm(5)(scattered((64, 5, 8, 8)))
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var((0, 2, 3), correction=0), torch.ones(5), atol=1e-4, rtol=0)


def test_running_variance_is_divided_by_m_minus_1():
    layer = BatchNorm(1, momentum=1.0)
    # The mean is 2, and the sum of squared deviations is 2. m is 2.
    layer(torch.tensor([[1.0], [3.0]]))
    assert layer.running_mean.item() == 2.0
    assert layer.running_var.item() == 2.0


INVALID = {
    "1 dimension": (torch.zeros(5), {}),
    "channels": (torch.zeros(2, 4), {}),
    "integers": (torch.zeros(2, 5, dtype=torch.long), {}),
    "complex": (torch.zeros(2, 5, dtype=torch.complex64), {}),
    "float64 input": (torch.zeros(2, 5, dtype=torch.float64), {}),
    "float32 input, float16 layer": (torch.zeros(2, 5), {"dtype": torch.float16}),
    "bfloat16 input, float16 layer": (
        torch.zeros(2, 5, dtype=torch.bfloat16),
        {"dtype": torch.float16},
    ),
    "one value": (torch.zeros(1, 5), {}),
    "one value, 3 dimensions": (torch.zeros(1, 5, 1), {}),
    "eps": (torch.zeros(2, 5), {"eps": 0.0}),
}


@pytest.mark.parametrize(("input", "options"), INVALID.values(), ids=INVALID)
def test_rejects_the_input_that_pytorchs_layer_rejects(input, options):
    with pytest.raises(ValueError, match="Expected"):
        BatchNorm(5, **options)(input)
    # PyTorch may raise a NotImplementedError, which is a RuntimeError.
    with pytest.raises((ValueError, RuntimeError)):
        nn.BatchNorm1d(5, **options)(input)


def test_input_must_have_num_dims_dimensions():
    with pytest.raises(ValueError, match="Expected 2-dimensional input, got 4 dimensions"):
        BatchNorm(5, num_dims=2)(torch.zeros(2, 5, 3, 3))


def test_one_value_per_channel_is_enough_in_eval_mode():
    x = torch.ones(1, 5)
    torch.testing.assert_close(BatchNorm(5).eval()(x), nn.BatchNorm1d(5).eval()(x))
