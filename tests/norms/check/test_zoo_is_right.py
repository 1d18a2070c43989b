"""The layers of tests.support.correct_norms agree with PyTorch's layers and functions."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.correct_norms import BATCH_NORMS, LAYERS
from tests.support.norm_batches import SHAPES, TORCH, scattered
from tests.support.planted_bases import per_channel

BETAS = ("bias", "shift")
MEANS = ("running_mean", "mu", "average")
VARIANCES = ("running_var", "sigma2", "variance")


def build(name, num_dims):
    return LAYERS[name](num_features=5, num_dims=num_dims)


def supported(names):
    """Return each name with each number of dims that its layer supports."""
    pairs = []
    for name in names:
        for num_dims in SHAPES:
            with contextlib.suppress(ValueError):
                build(name, num_dims)
                pairs.append((name, num_dims))
    return pairs


def randomize(layer, reference):
    """Give both layers the same random gamma, beta and running statistics."""
    torch.manual_seed(0)
    if reference.affine:
        nn.init.uniform_(reference.weight, -2, 2)
        nn.init.uniform_(reference.bias, -2, 2)
    if reference.track_running_stats:
        nn.init.uniform_(reference.running_mean, -2, 2)
        nn.init.uniform_(reference.running_var, 0.5, 3)

    states = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    with torch.no_grad():
        for name, state in states.items():
            if name in ("weight", "scale"):
                state.copy_(reference.weight.view(state.shape))
            elif name in BETAS:
                state.copy_(reference.bias.view(state.shape))
    copy_statistics(states, reference)


def copy_statistics(states, reference):
    for name, state in states.items():
        if name in MEANS:
            state.copy_(reference.running_mean.view(state.shape))
        elif name in VARIANCES:
            state.copy_(reference.running_var.view(state.shape))
        elif name == "running_std":
            state.copy_(reference.running_var.sqrt())


def results(layer, x, cotangent):
    """Return the output and the derivatives for the input, beta and gamma, if there are any."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    (y * cotangent).sum().backward()
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    gamma = [gradients[name].flatten() for name in ("weight", "scale") if name in gradients]
    beta = [gradients[name].flatten() for name in BETAS if name in gradients]
    return [y, x.grad, *gamma, *beta]


@pytest.mark.parametrize(("name", "num_dims"), supported(BATCH_NORMS))
def test_a_batch_norm_has_the_results_of_pytorchs(name, num_dims):
    layer = build(name, num_dims)
    # At this eps, a wrong place of eps would be visible.
    reference = TORCH[num_dims](5, eps=0.1, **BATCH_NORMS[name])
    setattr(layer, "epsilon" if hasattr(layer, "epsilon") else "eps", 0.1)
    randomize(layer, reference)

    # Evaluation is compared with the given statistics, and with those after two batches of
    # different sizes.
    for seed, training in enumerate((False, True, True, False)):
        layer.train(training)
        reference.train(training)
        x = scattered(SHAPES[num_dims], seed=seed)[seed:]
        cotangent = torch.randn_like(x)
        pairs = zip(results(layer, x, cotangent), results(reference, x, cotangent), strict=True)
        for result, expected in pairs:
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def channels_last_layer_norm(x, gamma, beta, eps):
    return F.layer_norm(x.movedim(1, -1), (x.size(1),), gamma, beta, eps).movedim(-1, 1)


def channels_last_rms_norm(x, gamma, beta, eps):
    return F.rms_norm(x.movedim(1, -1), (x.size(1),), gamma, eps).movedim(-1, 1)


def rms_norm_with_bias(x, gamma, beta, eps):
    return channels_last_rms_norm(x, gamma, beta, eps) + per_channel(beta, x)


FUNCTIONS = {
    "llama_rms_norm": channels_last_rms_norm,
    "llama_rms_norm_of_channels": channels_last_rms_norm,
    "t5_layer_norm": channels_last_rms_norm,
    "t5_layer_norm_of_channels": channels_last_rms_norm,
    "rms_norm_with_bias": rms_norm_with_bias,
    "convnext_layer_norm": channels_last_layer_norm,
    "torchvision_layer_norm": channels_last_layer_norm,
    "timm_layer_norm": channels_last_layer_norm,
    "layer_norm_of_samples": lambda x, *affine: F.group_norm(x, 1, *affine),
    "group_norm": lambda x, *affine: F.group_norm(x, 1, *affine),
    "instance_norm": lambda x, gamma, beta, eps: F.instance_norm(
        x, weight=gamma, bias=beta, eps=eps
    ),
}


@pytest.mark.parametrize(("name", "num_dims"), supported(FUNCTIONS))
def test_another_norm_has_the_results_of_pytorchs_function(name, num_dims):
    layer = build(name, num_dims)
    torch.manual_seed(0)
    gamma, beta = torch.randn(2, 5)
    layer.load_state_dict({"weight": gamma, "bias": beta}, strict=False)
    eps_name = "eps" if hasattr(layer, "eps") else "variance_epsilon"
    setattr(layer, eps_name, 0.1)

    x = scattered(SHAPES[num_dims])
    torch.testing.assert_close(layer(x), FUNCTIONS[name](x, gamma, beta, 0.1))


def test_two_groups_have_the_results_of_pytorchs():
    x = scattered((4, 6, 3, 5))
    layer = LAYERS["group_norm"](num_features=6, num_dims=4)
    torch.testing.assert_close(layer(x), F.group_norm(x, 2))


@pytest.mark.parametrize(("name", "size"), [("ghost_4", 4), ("ghost_8", 8)])
def test_ghost_batch_norm_normalizes_each_part_by_itself(name, size):
    x = scattered((16, 5, 3, 2))
    layer = LAYERS[name](num_features=5, num_dims=4)
    reference = nn.BatchNorm2d(5)
    expected = torch.cat([reference(part) for part in x.split(size)])
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.eval()(x), reference.eval()(x))


def test_batch_renorm_is_batch_norm_during_the_warmup():
    layer = LAYERS["batch_renorm_with_warmup"](num_features=5, num_dims=4)
    x = scattered((8, 5, 3, 2))
    torch.testing.assert_close(layer(x), nn.BatchNorm2d(5)(x))


@pytest.mark.parametrize("name", ["batch_renorm", "batch_renorm_with_warmup"])
def test_batch_renorm_has_the_results_of_evaluation_after_the_warmup(name):
    x = scattered((8, 5, 3, 2)) / 10
    layer = LAYERS[name](num_features=5, num_dims=4, momentum=0.5)
    layer.num_batches_tracked += 500

    # r and d are not clipped once the running statistics are close to those of the batch.
    for _ in range(40):
        y = layer(x)
    torch.testing.assert_close(y, layer.eval()(x), rtol=1e-4, atol=1e-4)
    reference = nn.BatchNorm2d(5).eval()
    reference.running_mean, reference.running_var = layer.running_mean, layer.running_var
    torch.testing.assert_close(layer(x), reference(x))


def test_weight_standardization_is_invariant_to_scale_and_offset_of_each_filter():
    torch.manual_seed(0)
    for num_dims in (3, 4, 5):
        layer = LAYERS["weight_standardized_conv"](num_features=5, num_dims=num_dims)
        x = scattered(SHAPES[num_dims])
        before = layer(x)
        assert before.shape == x.shape
        with torch.no_grad():
            layer.weight.mul_(3).add_(torch.randn(5, *[1] * (num_dims - 1)))
        torch.testing.assert_close(layer(x), before, rtol=1e-3, atol=1e-3)
