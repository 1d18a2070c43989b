"""Batch renormalization, compared with batch normalization and with calculations by hand."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bn_lightning import UserError
from bn_lightning.norms import registry
from bn_lightning.norms.renorm import BatchRenorm

SHAPES = {2: (8, 3), 4: (4, 3, 5, 2)}
UNBOUNDED = {"r_max": 1e9, "d_max": 1e9, "warmup": 0}
UNCORRECTED = {"r_max": 1, "d_max": 0, "warmup": 0}
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def scattered(num_dims, seed=0, dtype=torch.float64):
    """Return three channels with means 1, 2 and 3, and deviations 0.5, 1 and 1.5."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SHAPES[num_dims], generator=generator, dtype=torch.float64)
    factor = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).view((3,) + (1,) * (num_dims - 2))
    return (factor * (x / 2 + 1)).to(dtype)


def layer(num_dims=None, mean=(0.5, 2.0, 4.0), std=(1.0, 0.8, 1.2), dtype=torch.float64, **options):
    """Return a layer with other moving averages and parameters in each channel."""
    made = BatchRenorm(len(mean), num_dims, **options).to(dtype)
    state = {
        "weight": torch.linspace(0.5, 1.5, len(mean)),
        "bias": torch.linspace(-1, 1, len(mean)),
    }
    state |= {"running_mean": torch.tensor(mean), "running_std": torch.tensor(std)}
    made.load_state_dict(state, strict=False)
    return made


def results(function, x, weight, bias):
    """Return the output, and the gradients with respect to x, weight and bias.

    The loss gives each value of the output another weight.
    """
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    y = function(*leaves)
    factors = torch.linspace(0, 1, y.numel(), dtype=y.dtype).view_as(y)
    loss = (y.square() * factors).sum()
    return [y, *torch.autograd.grad(loss, leaves)]


def as_function(norm):
    """Return a layer as a function of the input, weight and bias."""
    return lambda x, w, b: functional_call(norm, {"weight": w, "bias": b}, x)


def assert_close(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("num_dims", SHAPES)
# On the first batch of a warmup, the limits allow no correction.
@pytest.mark.parametrize("options", [UNCORRECTED, {"warmup": 10}])
def test_without_correction_it_equals_batch_normalization(num_dims, options):
    norm, x = layer(num_dims, eps=1e-3, **options), scattered(num_dims)

    def batch_norm(x, w, b):
        return F.batch_norm(x, None, None, w, b, True, eps=1e-3)

    ours = results(as_function(norm), x, norm.weight, norm.bias)
    theirs = results(batch_norm, x, norm.weight, norm.bias)
    assert_close(ours, theirs)


@pytest.mark.parametrize("num_dims", SHAPES)
def test_without_clipping_training_output_equals_eval_output(num_dims):
    norm, x = layer(num_dims, **UNBOUNDED), scattered(num_dims)
    in_eval = copy.deepcopy(norm).eval()(x)
    in_training = norm(x)
    torch.testing.assert_close(in_training, in_eval, **EXACT)
    # Batch normalization gives another output.
    batch_norm = F.batch_norm(x, None, None, norm.weight, norm.bias, True)
    assert (batch_norm - in_eval).abs().max() > 0.1


@pytest.mark.parametrize("num_dims", SHAPES)
def test_default_limits_clip_nothing_after_the_averages_have_converged(num_dims):
    norm = layer(num_dims, momentum=0.1, warmup=20)
    for seed in range(100):
        norm(scattered(num_dims, seed))
    x = scattered(num_dims, 100)
    in_eval = copy.deepcopy(norm).eval()(x)
    torch.testing.assert_close(norm(x), in_eval, **EXACT)


def test_averages_move_towards_the_mean_and_deviation_of_the_batch():
    norm, x = layer(eps=0.25, warmup=3), scattered(2)
    mean, std = x.mean(0), (x.var(0, correction=0) + 0.25).sqrt()
    old_mean, old_std = norm.running_mean.clone(), norm.running_std.clone()
    for _ in range(10):
        norm(x)
    old_weight = (1 - 0.01) ** 10
    torch.testing.assert_close(norm.running_mean, mean + old_weight * (old_mean - mean), **EXACT)
    torch.testing.assert_close(norm.running_std, std + old_weight * (old_std - std), **EXACT)


def test_clipping_equals_a_calculation_by_hand():
    # In each channel, m = 2 and s = sqrt(1 + eps) = 2, so (x - m) / s is -1/2 and 1/2.
    x = torch.tensor([[1.0], [3.0]], dtype=torch.float64).expand(2, 4)
    norm = layer(
        mean=(0.0, 0.0, 14.0, -10.0),
        std=(0.5, 8.0, 2.0, 2.0),
        eps=3,
        momentum=0.5,
        r_max=3,
        d_max=5,
        warmup=0,
    )
    with torch.no_grad():
        norm.weight.fill_(2)
        norm.bias.fill_(1)
    # Each pair is 2 * (-1/2 * r + d) + 1 and 2 * (1/2 * r + d) + 1.
    expected = [
        (-3 + 8 + 1, 3 + 8 + 1),  # r = 2 / 0.5, clipped to 3; d = 2 / 0.5
        (-1 / 3 + 0.5 + 1, 1 / 3 + 0.5 + 1),  # r = 2 / 8, clipped to 1/3; d = 2 / 8
        (-1 - 10 + 1, 1 - 10 + 1),  # r = 1; d = (2 - 14) / 2, clipped to -5
        (-1 + 10 + 1, 1 + 10 + 1),  # r = 1; d = (2 + 10) / 2, clipped to 5
    ]
    torch.testing.assert_close(norm(x), torch.tensor(expected, dtype=torch.float64).T, **EXACT)
    # The averages move half way to m = 2 and s = 2. s is not clipped, and it is not the variance.
    assert norm.running_mean.tolist() == [1, 1, 8, -4]
    assert norm.running_std.tolist() == [1.25, 5, 2, 2]
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("num_dims", SHAPES)
@pytest.mark.parametrize("bounds", [UNBOUNDED, {"r_max": 1.1, "d_max": 0.2, "warmup": 0}])
def test_gradient_treats_r_and_d_as_constants(num_dims, bounds):
    norm, x = layer(num_dims, **bounds), scattered(num_dims)
    dims = [d for d in range(num_dims) if d != 1]
    s, m = (x.var(dims, correction=0) + norm.eps).sqrt(), x.mean(dims)
    r = (s / norm.running_std).clamp(1 / bounds["r_max"], bounds["r_max"])
    d = ((m - norm.running_mean) / norm.running_std).clamp(-bounds["d_max"], bounds["d_max"])

    def batch_norm(x, w, b):
        return F.batch_norm(x, None, None, w * r, b + w * d, True, eps=norm.eps)

    ours = results(as_function(norm), x, norm.weight, norm.bias)
    theirs = results(batch_norm, x, norm.weight, norm.bias)
    assert_close(ours, theirs)
    assert not norm.running_mean.requires_grad and not norm.running_std.requires_grad


@pytest.mark.parametrize("num_dims", SHAPES)
def test_gradient_matches_finite_differences_only_if_r_and_d_are_clipped(num_dims):
    # A clipped r or d is constant under small steps of x, so finite differences match the gradient.
    # Otherwise r and d change with x. Finite differences include this, but the gradient must not.
    x = scattered(num_dims).requires_grad_()

    def agrees(**options):
        norm = layer(num_dims, momentum=0, warmup=0, **options)
        inputs = (x, norm.weight, norm.bias)
        return gradcheck(as_function(norm), inputs, raise_exception=False)

    assert agrees(mean=(1e4, -1e4, 1e4), std=(100.0, 0.001, 100.0))
    assert not agrees()
    (gradient,) = torch.autograd.grad(layer(num_dims, **UNBOUNDED)(x)[:, 0].sum(), x)
    # As in batch normalization, the sum of a channel's output does not depend on x.
    torch.testing.assert_close(gradient, torch.zeros_like(x), **EXACT)


def test_limits_grow_with_each_training_batch():
    # The moving averages are constant, and so far from the batch that r and d are at their limits.
    norm = layer(mean=(-1e6, 1e6), std=(1e-3, 1e4), momentum=0, r_max=3, d_max=5, warmup=4)
    x = scattered(2)[:, :2]
    x_hat = F.batch_norm(x, None, None, training=True)
    for r, d in [(1, 0), (1.5, 1.25), (2, 2.5), (2.5, 3.75), (3, 5), (3, 5)]:
        # A batch in eval mode does not count.
        norm.eval()(x)
        expected = x_hat * torch.tensor([r, 1 / r], dtype=x.dtype) + torch.tensor([d, -d])
        torch.testing.assert_close(norm.train()(x), norm.weight * expected + norm.bias, **EXACT)


def test_state_is_restored_from_a_checkpoint():
    old, new = layer(4, warmup=4), BatchRenorm(3, 4, warmup=4).double()
    for seed in range(2):
        old(scattered(4, seed))
    stored = io.BytesIO()
    torch.save(old.state_dict(), stored)
    stored.seek(0)
    new.load_state_dict(torch.load(stored, weights_only=True))
    assert set(new.state_dict()) == {
        "weight",
        "bias",
        "running_mean",
        "running_std",
        "num_batches_tracked",
    }
    # These batches continue the warmup and pass its end.
    for seed in range(2, 5):
        assert torch.equal(new(scattered(4, seed)), old(scattered(4, seed)))
    assert torch.equal(new.eval()(scattered(4)), old.eval()(scattered(4)))
    with pytest.raises(RuntimeError, match="running_var"):
        new.load_state_dict(torch.nn.BatchNorm2d(3).state_dict())


@pytest.mark.parametrize("num_dims", SHAPES)
def test_eval_mode_normalizes_each_sample_independently_and_changes_no_state(num_dims):
    norm, x = layer(num_dims).eval(), scattered(num_dims)
    before = copy.deepcopy(norm.state_dict())
    y = norm(x)
    assert torch.equal(norm(x), y)
    assert torch.equal(torch.cat([norm(image) for image in x.split(1)]), y)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    # S includes eps, and F.batch_norm adds it again.
    var = norm.running_std**2 - norm.eps
    expected = F.batch_norm(x, norm.running_mean, var, norm.weight, norm.bias, eps=norm.eps)
    torch.testing.assert_close(y, expected, **EXACT)


@pytest.mark.parametrize("num_dims", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_half_precision_input_is_computed_in_float32(num_dims, dtype, training):
    x = scattered(num_dims, dtype=dtype)
    norm, exact = (
        layer(num_dims, dtype=d, warmup=0).train(training) for d in (torch.float32, torch.float64)
    )
    y = norm(x)
    assert y.dtype == dtype
    # The only error is the rounding of the result: half a unit in the last place.
    rtol = torch.finfo(dtype).eps / 2 * 1.01
    torch.testing.assert_close(y.double(), exact(x.double()), rtol=rtol, atol=1e-5)
    assert norm.running_mean.dtype == torch.float32


def test_output_and_gradient_of_constant_input_are_finite():
    norm = BatchRenorm(3, warmup=0)
    for _ in range(3):
        x = torch.full((8, 3), 7.0, requires_grad=True)
        y = norm(x)
        y.square().sum().backward()
        assert y.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("num_dims", "x", "message"),
    [
        (4, torch.ones(4, 3), r"Expected 4-dimensional input, got 2 dimensions: \(4, 3\)"),
        (2, torch.ones(4, 3, 2, 2), "Expected 2-dimensional input, got 4 dimensions"),
        (None, torch.ones(3), "two or more dimensions"),
        # One channel would broadcast.
        (2, torch.ones(4, 1), "Expected 3 channels"),
        (2, torch.ones(4, 3, dtype=torch.long), "floating-point"),
        (2, torch.ones(4, 3, dtype=torch.float64), "float32"),
    ],
)
def test_invalid_input_is_rejected(num_dims, x, message, training):
    with pytest.raises(ValueError, match=message):
        BatchRenorm(3, num_dims).train(training)(x)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1), (0, 3)])
def test_fewer_than_two_values_per_channel_are_rejected_in_training(shape):
    norm = BatchRenorm(3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(torch.ones(shape))
    assert norm.num_batches_tracked == 0
    assert norm.eval()(torch.ones(shape)).shape == shape


@pytest.mark.parametrize(
    "options",
    [
        {"r_max": 0.5},
        {"r_max": float("inf")},
        {"r_max": float("nan")},
        {"d_max": -1},
        {"warmup": -1},
    ],
)
def test_an_invalid_setting_is_rejected(options):
    (name,) = options
    with pytest.raises(UserError, match=f"{name} is .* must be finite and at least"):
        BatchRenorm(3, **options)


@pytest.mark.parametrize("num_dims", SHAPES)
def test_is_built_by_its_import_path(num_dims):
    norm = registry.make("bn_lightning.norms.renorm.BatchRenorm", 3, num_dims, {"d_max": 2.5})
    assert (norm.num_features, norm.num_dims, norm.d_max) == (3, num_dims, 2.5)
    assert norm(scattered(num_dims, dtype=torch.float32)).shape == SHAPES[num_dims]


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_results_of_a_plain_step(reentrant):
    results = []
    for run in (lambda f, x: f(x), partial(checkpoint, use_reentrant=reentrant)):
        norm = layer(warmup=0)
        for seed in range(3):
            x = scattered(4, seed).requires_grad_()
            y = run(norm, x)
            y.pow(3).sum().backward()
        results.append((y, x.grad, norm.weight.grad, norm.bias.grad, *norm.buffers()))
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


def test_two_checkpointed_calls_before_one_backward_pass_are_rejected():
    norm = layer(warmup=0)
    y = sum(
        checkpoint(norm, scattered(4, seed).requires_grad_(), use_reentrant=False).sum()
        for seed in (0, 1)
    )
    with pytest.raises(RuntimeError, match="it must be called once between two backward passes"):
        y.backward()


def test_checkpointed_batches_may_contain_nan():
    x = scattered(4)
    x[0, 0] = torch.nan
    x.requires_grad_()
    checkpoint(layer(), x, use_reentrant=False).sum().backward()
    assert x.grad[:, 0].isnan().all()
    assert not x.grad[:, 1:].isnan().any()


def test_a_layer_that_has_trained_compiles_copies_and_pickles():
    norm, x = layer(), scattered(4)
    torch.func.grad(lambda x: functional_call(norm, clones(norm), x).pow(3).sum())(x)
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        torch.compiler.reset()
        compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
        expected = copy.deepcopy(norm)
        for _ in range(3):
            torch.testing.assert_close(compiled(x), expected(x))


def clones(norm):
    return {name: buffer.clone() for name, buffer in norm.named_buffers()}


def test_moving_averages_keep_32_bits_in_a_layer_of_16_bits():
    """In bfloat16, a moving average stops at a distance of momentum / 2^-9 units of its value."""
    torch.manual_seed(0)
    with_default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    created = BatchRenorm(3)
    torch.set_default_dtype(with_default)
    converted = BatchRenorm(3).bfloat16()
    for norm in (created, converted):
        assert norm.weight.dtype == torch.bfloat16
        for _ in range(1000):
            norm(torch.randn(32, 3).bfloat16() + 1)
        torch.testing.assert_close(norm.running_mean, torch.ones(3), atol=0.05, rtol=0)
        assert norm.eval()(torch.randn(32, 3).bfloat16()).dtype == torch.bfloat16
    assert BatchRenorm(3).double().running_mean.dtype == torch.float64
