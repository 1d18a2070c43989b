"""PyTorch's layers as norms: what they compute, their arguments, and the shapes they refuse."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bn_lightning import LeNet, UserError
from bn_lightning.networks.resnet import ResNet
from bn_lightning.norms import registry, torch_norms
from tests.support.new_norms import assert_rounded_once, output_and_gradients, per_channel, shaken
from tests.support.norm_batches import SHAPES, TORCH, scattered


def test_builtin_passes_its_arguments_to_pytorchs_layer():
    layer = torch_norms.builtin(6, 4, 1e-3, None, False, False)
    assert type(layer) is nn.BatchNorm2d
    assert (layer.eps, layer.momentum, layer.weight, layer.running_mean) == (1e-3, None, None, None)
    assert {dims: type(torch_norms.builtin(6, dims)) for dims in SHAPES} == TORCH


def layer_norm(x, weight, bias):
    """Layer normalization over channels and positions: each sample is one row."""
    y = F.layer_norm(x.flatten(1), (x[0].numel(),), eps=1e-3).view_as(x)
    return y * per_channel(weight, x) + per_channel(bias, x)


def instance_norm(x, weight, bias):
    """Each sample is a batch of its own."""
    norm = [F.batch_norm(s, None, None, weight, bias, True, eps=1e-3) for s in x.split(1)]
    return torch.cat(norm)


TRUTHS = {"layer": layer_norm, "instance": instance_norm}
CASES = [(name, dims) for name in TRUTHS for dims in SHAPES if (name, dims) != ("instance", 2)]


@pytest.mark.parametrize(("name", "num_dims"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_each_sample_is_normalized_separately(name, num_dims, dtype, tolerance):
    layer = shaken(name, 5, num_dims, dtype, eps=1e-3)
    x = scattered(SHAPES[num_dims], dtype)
    parameters = layer.weight, layer.bias
    theirs = output_and_gradients(lambda x: TRUTHS[name](x, *parameters), x, *parameters)
    for mode in (True, False):
        ours = output_and_gradients(layer.train(mode), x, *parameters)
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "num_dims"), CASES)
def test_half_precision_input_is_computed_in_float32(name, num_dims):
    layer = shaken(name, 5, num_dims, eps=1e-3)
    for dtype in (torch.bfloat16, torch.float16):
        x = scattered(SHAPES[num_dims], dtype)
        y = layer(x)
        assert y.dtype == dtype
        assert_rounded_once(y, TRUTHS[name](x.double(), layer.weight.double(), layer.bias.double()))


def test_arguments_are_those_of_pytorchs_layers():
    assert type(torch_norms.layer(6, 2)) is nn.LayerNorm
    assert [type(torch_norms.instance(6, dims)) for dims in (3, 4, 5)] == [
        nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d
    ]  # fmt: skip
    group = torch_norms.layer(6, 4, eps=0.5, affine=False)
    assert (group.num_groups, group.eps, group.weight) == (1, 0.5, None)
    tracking = torch_norms.instance(6, 4, 0.5, 0.3, False, True)
    assert (tracking.eps, tracking.momentum, tracking.weight) == (0.5, 0.3, None)
    assert tracking.running_var.shape == (6,)
    assert torch_norms.instance(6, 4).running_var is None


# Shapes that a norm cannot have


@pytest.mark.parametrize(("num_dims", "num_groups"), [(4, 0), (4, 4), (2, 6)])
def test_an_impossible_number_of_groups_is_rejected_with_the_possible_ones(num_dims, num_groups):
    with pytest.raises(UserError, match="must be one of 1, 2, 3"):
        torch_norms.group(6, num_dims, num_groups)


def test_groups_of_one_channel_are_allowed_after_a_convolution():
    assert torch_norms.group(6, 4, 6).num_groups == 6


@pytest.mark.parametrize("name", ["builtin", "ghost", "frozen", "layer", "instance", "rms"])
def test_other_numbers_of_dimensions_are_refused(name):
    for num_dims in (1, 6, "4"):
        with pytest.raises(UserError, match=f"'{name}' .*{num_dims}; it must be one of .*3, 4, 5"):
            registry.make(name, 6, num_dims)


@pytest.mark.parametrize("num_dims", [3, 5])
def test_the_articles_layer_is_refused_where_it_would_not_broadcast(num_dims):
    with pytest.raises(UserError, match=r"'article' was .*must be one of 2, 4\."):
        registry.make("article", 6, num_dims)


@pytest.mark.parametrize(
    ("name", "num_dims"), [("layer", 2), ("group", 2), ("rms", 2), ("rms", 4), ("rms", 3)]
)
def test_one_channel_is_refused_where_its_value_would_be_lost(name, num_dims):
    with pytest.raises(UserError, match=f"'{name}' needs at least 2 channels .*, got 1"):
        registry.make(name, 1, num_dims)


def test_one_channel_with_several_positions_is_allowed():
    for name in ("layer", "instance"):
        y = registry.make(name, 1, 4)(scattered((3, 1, 4, 5)))
        torch.testing.assert_close(y.mean((1, 2, 3)), torch.zeros(3), atol=1e-6, rtol=0)


def test_instance_norm_behind_a_linear_layer_is_refused_with_remedies_that_work():
    with pytest.raises(UserError) as refused:
        LeNet("instance")
    message = str(refused.value)
    assert "behind a linear layer (num_dims 2); it needs num_dims 3, 4 or 5" in message
    assert len(message.splitlines()) < 12

    # Each remedy of the message.
    images = torch.rand(4, 1, 28, 28)
    assert "--model.norm layer or group" in message
    for name in ("layer", "group"):
        LeNet(name)(images).sum().backward()
    assert "--model.network resnet" in message
    ResNet(1, (28, 28), 10, registry.factory("instance"), depth=8, width=4)(images).sum().backward()
    written = {}
    exec("\n".join(line[4:] for line in message.splitlines() if line.startswith("    ")), written)
    norms = dict(LeNet(written["instance_or_layer"]).named_children())
    assert [type(norms[f"norm{i}"]) for i in (1, 2, 3, 4)] == [
        nn.InstanceNorm2d, nn.InstanceNorm2d, nn.LayerNorm, nn.LayerNorm
    ]  # fmt: skip
