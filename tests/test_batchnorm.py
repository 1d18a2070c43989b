import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bn_lightning import BatchNorm, batch_norm

SHAPES = {2: (8, 5), 3: (8, 5, 7), 4: (8, 5, 6, 4), 5: (4, 5, 3, 2, 2)}
TORCH = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def scattered(shape, dtype=torch.float32, seed=0):
    """Values with another mean and deviation in each channel."""
    generator = torch.Generator().manual_seed(seed)
    per_channel = (-1,) + (1,) * (len(shape) - 2)
    offset = torch.arange(shape[1], dtype=torch.float64).view(per_channel)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * (1 + offset) + 3 * offset
    return x.to(dtype)


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
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


@pytest.mark.parametrize("num_dims", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_half_precision_input_is_computed_in_float32(num_dims, dtype, training):
    x = scattered(SHAPES[num_dims], dtype)
    ours, theirs = BatchNorm(5).train(training), TORCH[num_dims](5).train(training)
    y = ours(x)
    assert y.dtype == dtype
    exact = F.batch_norm(x.double(), torch.zeros(5).double(), torch.ones(5).double(), training=training)
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


def test_gradcheck():
    x = scattered((4, 3, 2, 2), torch.float64).requires_grad_()
    weight = torch.rand(3, dtype=torch.float64, requires_grad=True)
    bias = torch.rand(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w, b: batch_norm(x, None, None, w, b, True), (x, weight, bias))


def test_a_fresh_layer_gives_zero_mean_and_unit_variance():
    y = BatchNorm(5)(scattered((64, 5, 8, 8)))
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var((0, 2, 3), correction=0), torch.ones(5), atol=1e-4, rtol=0)


def test_running_variance_is_corrected_once():
    layer = BatchNorm(1, momentum=1.0)
    layer(torch.tensor([[1.0], [3.0]]))  # mean 2; variance 1 divided by m, 2 divided by m - 1
    assert layer.running_mean.item() == 2.0
    assert layer.running_var.item() == 2.0


@pytest.mark.parametrize(
    ("layer", "input"),
    [
        (BatchNorm(5), torch.zeros(5)),
        (BatchNorm(5), torch.zeros(2, 4)),
        (BatchNorm(5), torch.zeros(2, 5, dtype=torch.long)),
        (BatchNorm(5), torch.zeros(1, 5)),
        (BatchNorm(5, num_dims=2), torch.zeros(2, 5, 3, 3)),
    ],
    ids=["rank 1", "channels", "integers", "one value per channel", "num_dims"],
)
def test_refuses(layer, input):
    with pytest.raises(ValueError, match="xpected"):
        layer(input)
    if input.dim() == 2 and layer.num_dims is None:  # torch's layer refuses it too
        with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
            nn.BatchNorm1d(5)(input)
