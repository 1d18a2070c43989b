import copy
import inspect
import io
import pickle
import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bn_lightning import BatchNorm, batch_norm
from tests.support.norm_batches import SHAPES, TORCH, scattered


@pytest.mark.parametrize("num_dims", SHAPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_is_torchs_function(num_dims, training, affine, dtype, tolerance):
    x = scattered(SHAPES[num_dims], dtype)
    results = []
    for function in (batch_norm, F.batch_norm):
        mean, var = torch.linspace(-1, 1, 5, dtype=dtype), torch.linspace(0.5, 2, 5, dtype=dtype)
        weight = torch.linspace(0.5, 1.5, 5, dtype=dtype).requires_grad_() if affine else None
        bias = torch.linspace(1, 2, 5, dtype=dtype).requires_grad_() if affine else None
        leaf = x.clone().requires_grad_()
        y = function(leaf, mean, var, weight, bias, training, 0.3, 1e-3)
        y.square().mul(torch.linspace(0, 1, y.numel(), dtype=dtype).view_as(y)).sum().backward()
        results.append([y, mean, var, leaf.grad, *((weight.grad, bias.grad) if affine else ())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item()
        )


@pytest.mark.parametrize("num_dims", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_half_precision_input_is_computed_in_float32(num_dims, dtype, training):
    x = scattered(SHAPES[num_dims], dtype)
    ours, theirs = BatchNorm(5).train(training), TORCH[num_dims](5).train(training)
    y = ours(x)
    assert y.dtype == dtype
    exact = F.batch_norm(
        x.double(), torch.zeros(5).double(), torch.ones(5).double(), training=training
    )
    # The only error left is that of rounding the result: half a unit in the last place.
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps / 2 * 1.01, atol=1e-5)
    theirs(x)
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_dims", SHAPES)
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"momentum": 0.7, "eps": 0.1}, {"affine": False},
                                     {"bias": False}, {"track_running_stats": False}])  # fmt: skip
def test_layer_goes_the_way_of_torchs_over_several_steps(num_dims, options):
    if not options.keys() <= inspect.signature(TORCH[num_dims]).parameters.keys():
        pytest.skip(f"torch {torch.__version__}'s own layer has no {list(options)}")
    ours, theirs = BatchNorm(5, **options), TORCH[num_dims](5, **options)
    ours.load_state_dict(theirs.state_dict())
    for seed in range(3):
        x = scattered(SHAPES[num_dims], seed=seed)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    theirs.load_state_dict(ours.state_dict())  # and back
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    x = scattered(SHAPES[num_dims], seed=9)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_dims", SHAPES)
def test_derivatives_of_first_and_second_order_and_in_forward_mode(num_dims):
    shape = (2, 3, 2, 2, 2)[:num_dims] if num_dims > 2 else (4, 3)
    x = scattered(shape, torch.float64).requires_grad_()
    weight = torch.linspace(0.5, 1.5, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.linspace(-1, 1, 3, dtype=torch.float64, requires_grad=True)

    def function(x, weight, bias):
        return batch_norm(x, None, None, weight, bias, True)

    assert torch.autograd.gradcheck(
        function, (x, weight, bias), check_forward_ad=True, check_batched_grad=True
    )
    assert torch.autograd.gradgradcheck(function, (x, weight, bias), check_fwd_over_rev=True)


def test_gradients_of_what_does_not_need_all_of_them():
    x = scattered((8, 5), torch.float64)
    for layer in (
        BatchNorm(5, affine=False),
        BatchNorm(5, bias=False),
        BatchNorm(5).requires_grad_(False),
    ):
        layer.double()
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(layer(leaf).pow(3).sum(), leaf)
        leaf = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(
            F.batch_norm(leaf, None, None, training=True).pow(3).sum(), leaf
        )
        torch.testing.assert_close(dx, expected)
    layer = BatchNorm(5).double()
    layer(x).pow(3).sum().backward()  # input without gradient
    weight, bias = torch.ones(5).double().requires_grad_(), torch.zeros(5).double().requires_grad_()
    F.batch_norm(x, None, None, weight, bias, True).pow(3).sum().backward()
    torch.testing.assert_close(layer.weight.grad, weight.grad)
    torch.testing.assert_close(layer.bias.grad, bias.grad)


def test_function_transforms():
    """vmap and grad of torch.func, where torch's layer allows them: without running statistics to write to."""
    x = scattered((3, 8, 5, 4, 4), torch.float64)
    for function in (
        torch.func.vmap,
        lambda f: torch.func.vmap(torch.func.grad(lambda x: f(x).pow(3).sum())),
    ):
        ours, theirs = (
            function(layer(5, track_running_stats=False, dtype=torch.float64))(x)
            for layer in (BatchNorm, nn.BatchNorm2d)
        )
        torch.testing.assert_close(ours, theirs)
    layer = BatchNorm(5, dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def loss(parameters, buffers, x):
        return torch.func.functional_call(layer, parameters | buffers, (x,)).pow(3).sum()

    gradients = torch.func.grad(loss)(parameters, dict(layer.named_buffers()), x[0])
    layer(x[0]).pow(3).sum().backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, parameters[name].grad)


def test_activation_checkpointing_gives_the_same_gradients():
    gradients = []
    for reentrant in (None, True, False):
        x, layer = scattered((8, 5, 4, 4)).requires_grad_(), BatchNorm(5)
        block = nn.Sequential(layer, nn.Sigmoid())
        y = (
            block(x)
            if reentrant is None
            else torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)
        )
        y.pow(2).sum().backward()
        gradients.append((x.grad, layer.weight.grad, layer.bias.grad))
    for plain, *checkpointed in zip(*gradients, strict=True):
        assert all(torch.equal(plain, other) for other in checkpointed)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiles_in_one_graph(momentum):
    layer = BatchNorm(5, momentum=momentum)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True)
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
def test_exports(training):
    layer = BatchNorm(5).train(training)
    x = scattered((8, 5, 6, 4))
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(copy.deepcopy(layer), (x,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(x[:3]), copy.deepcopy(layer)(x[:3]))


def test_survives_copies_pickles_and_files():
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


def test_state_of_before_batches_were_counted_loads():
    """torch 0.4.0's layers had no num_batches_tracked, and no version in their state."""
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


def test_meta_device():
    layer = BatchNorm(5, device="meta")
    x = (
        torch.empty(8, 5, 6, 4, device="meta")
        .to(memory_format=torch.channels_last)
        .requires_grad_()
    )
    y = layer(x)
    y.sum().backward()
    assert (y.shape, y.stride(), y.device.type, x.grad.shape) == (
        x.shape,
        x.stride(),
        "meta",
        x.shape,
    )
    layer.to_empty(device="cpu").reset_parameters()
    for name, value in nn.BatchNorm2d(5).state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name


def test_autocast():
    """Behind a layer that gives bfloat16, the norm computes in float32 and gives bfloat16, as torch's does."""
    torch.manual_seed(0)
    x = torch.randn(8, 1, 8, 8)
    convolution = nn.Conv2d(1, 5, 3)
    outputs = []
    for layer in (BatchNorm(5), nn.BatchNorm2d(5)):
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(layer(convolution(x)))
    assert outputs[0].dtype == outputs[1].dtype == torch.bfloat16
    torch.testing.assert_close(*outputs, rtol=2**-7, atol=1e-6)


def test_a_fresh_layer_gives_zero_mean_and_unit_variance():
    y = BatchNorm(5)(scattered((64, 5, 8, 8)))
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var((0, 2, 3), correction=0), torch.ones(5), atol=1e-4, rtol=0)


def test_running_variance_is_corrected_once():
    layer = BatchNorm(1, momentum=1.0)
    layer(torch.tensor([[1.0], [3.0]]))  # mean 2; variance 1 divided by m, 2 divided by m - 1
    assert layer.running_mean.item() == 2.0
    assert layer.running_var.item() == 2.0


LONG, HALF = torch.long, torch.float16


@pytest.mark.parametrize(
    ("input", "options"),
    [
        (torch.zeros(5), {}),
        (torch.zeros(2, 4), {}),
        (torch.zeros(2, 5, dtype=LONG), {}),
        (torch.zeros(2, 5, dtype=torch.complex64), {}),
        (torch.zeros(2, 5, dtype=torch.float64), {}),
        (torch.zeros(2, 5), {"dtype": HALF}),
        (torch.zeros(2, 5, dtype=torch.bfloat16), {"dtype": HALF}),
        (torch.zeros(1, 5), {}),
        (torch.zeros(1, 5, 1), {}),
        (torch.zeros(2, 5), {"eps": 0.0}),
    ],
    ids=["rank", "channels", "integers", "complex", "float64", "float32 by half", "bfloat16 by half", "one value",
         "one value of 3-d", "eps"],
)  # fmt: skip
def test_refuses_what_torchs_layer_refuses(input, options):
    with pytest.raises(ValueError, match="expected"):
        BatchNorm(5, **options)(input)
    with pytest.raises((ValueError, RuntimeError)):  # NotImplementedError among them
        nn.BatchNorm1d(5, **options)(input)


def test_num_dims_is_the_only_rank_that_is_taken():
    with pytest.raises(ValueError, match="expected 2-d input, got 4-d"):
        BatchNorm(5, num_dims=2)(torch.zeros(2, 5, 3, 3))


def test_one_value_per_channel_is_enough_in_eval_mode():
    torch.testing.assert_close(
        BatchNorm(5).eval()(torch.ones(1, 5)), nn.BatchNorm1d(5).eval()(torch.ones(1, 5))
    )
