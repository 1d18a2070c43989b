"""Frozen batch normalization, compared with torch's batch normalization and torchvision's layer."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

from bn_lightning import BatchNorm, LayerSync, replace_norms
from bn_lightning.norms import recognition
from bn_lightning.norms.frozen import FrozenBatchNorm
from tests.support.new_norms import assert_rounded_once, output_and_gradients, shaken
from tests.support.norm_batches import SHAPES, TORCH, scattered


def in_eval_mode(x, layer):
    statistics = layer.running_mean, layer.running_var
    values = (tensor.to(x.dtype) for tensor in (*statistics, layer.weight, layer.bias))
    return F.batch_norm(x, *values, eps=layer.eps)


@pytest.mark.parametrize("num_dims", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_both_modes_equal_batch_norm_in_eval_mode(num_dims, dtype, tolerance):
    layer = shaken("frozen", 5, num_dims, dtype, eps=0.1)
    before = copy.deepcopy(layer.state_dict())
    x = scattered(SHAPES[num_dims], dtype)
    theirs = output_and_gradients(lambda x: in_eval_mode(x, layer), x)
    for mode in (True, False):
        ours = output_and_gradients(layer.train(mode), x)
        scale = max(t.abs().max().item() for t in theirs)
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * scale)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    assert not list(layer.parameters())


@pytest.mark.parametrize("num_dims", SHAPES)
def test_half_precision_input_gives_half_precision_output(num_dims):
    layer = shaken("frozen", 5, num_dims)
    for dtype in (torch.bfloat16, torch.float16):
        x = scattered(SHAPES[num_dims], dtype)
        y = layer(x)
        assert y.dtype == dtype
        assert_rounded_once(y, in_eval_mode(x.double(), layer))


def test_it_equals_torchvisions_layer_and_exchanges_its_state():
    ours, theirs = shaken("frozen", 5, 4, eps=0.1), FrozenBatchNorm2d(5, eps=0.1)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = scattered(SHAPES[4])
    torch.testing.assert_close(ours(x), theirs(x))
    assert theirs(x.half()).dtype == torch.float32


@pytest.mark.parametrize("num_dims", SHAPES)
def test_states_of_batch_norm_load_and_load_back(num_dims):
    x = scattered(SHAPES[num_dims])
    for norm in (TORCH[num_dims](5), BatchNorm(5)):
        nn.init.uniform_(norm.weight)
        nn.init.uniform_(norm.bias)
        norm(x)
        state = norm.state_dict()
        frozen = FrozenBatchNorm(5, num_dims)
        frozen.load_state_dict(state)
        torch.testing.assert_close(frozen(x), norm.eval()(x))
        assert "num_batches_tracked" in state
        restored = type(norm)(5).eval()
        restored.load_state_dict(frozen.state_dict())
        torch.testing.assert_close(restored(x), frozen(x))


def test_fixed_statistics_are_not_synchronized_or_recomputed():
    network = nn.Sequential(FrozenBatchNorm(5), nn.ReLU())
    assert list(recognition.layers(network)) == ["0"]
    assert recognition.with_statistics(network) == {}
    LayerSync().synchronize(network, "cpu")
    both = nn.Sequential(network, BatchNorm(5))
    assert list(recognition.with_statistics(both)) == ["1"]


def test_replaced_layers_stay_as_they_are_in_training_and_can_be_restored():
    network = nn.Sequential(
        nn.Conv2d(3, 5, 2), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(40, 4), nn.BatchNorm1d(4)
    )
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 1)
    before, x = copy.deepcopy(network), scattered((6, 3, 3, 5))
    replace_norms(network, "frozen")
    assert type(network[1]) is type(network[4]) is FrozenBatchNorm
    assert [name for name, _ in network.named_parameters()] == [
        "0.weight", "0.bias", "3.weight", "3.bias"
    ]  # fmt: skip
    torch.testing.assert_close(network.train()(x), before.eval()(x))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    network(x).square().sum().backward()
    optimizer.step()

    # Training has changed the other layers only.
    for norm in ("custom", "builtin"):
        replace_norms(network, norm)
        assert network[1].weight.requires_grad and network[4].bias.requires_grad
        for i in (1, 4):
            torch.testing.assert_close(network[i].state_dict(), before[i].state_dict())
    assert type(network[1]) is nn.BatchNorm2d
