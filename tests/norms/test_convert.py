"""Conversion to PyTorch's layers and back, and tools that accept only PyTorch's layers."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import update_bn

from bn_lightning import BatchNorm, LeNet, from_torch, to_torch


def images(number=64, seed=0):
    return torch.rand(number, 1, 28, 28, generator=torch.Generator().manual_seed(seed))


def tensor_ids(network):
    return {name: id(t) for name, t in (*network.named_parameters(), *network.named_buffers())}


def test_conversion_there_and_back_keeps_tensors_and_output():
    network = LeNet("custom")
    network(images())
    expected = copy.deepcopy(network).eval()(images(seed=1))
    tensors = tensor_ids(network)
    to_torch(network)
    assert type(network.norm1) is nn.BatchNorm2d
    assert type(network.norm3) is nn.BatchNorm1d
    torch.testing.assert_close(network.eval()(images(seed=1)), expected)
    from_torch(network)
    assert sum(type(module) is BatchNorm for module in network.modules()) == 4
    torch.testing.assert_close(network.eval()(images(seed=1)), expected)
    assert tensor_ids(network) == tensors


def test_a_single_layer_is_converted():
    assert type(to_torch(BatchNorm(3, num_dims=5))) is nn.BatchNorm3d
    assert from_torch(nn.BatchNorm2d(3)).num_dims == 4


def test_a_layer_without_num_dims_is_rejected_and_nothing_changes():
    layers = nn.Sequential(BatchNorm(3, num_dims=4), BatchNorm(3))
    with pytest.raises(ValueError, match="its num_dims is None"):
        to_torch(layers)
    assert type(layers[0]) is BatchNorm


def test_update_bn_updates_a_converted_network_only():
    batches = [images(seed=seed) for seed in range(5)]
    network = LeNet("custom")
    before = copy.deepcopy(network.state_dict())
    update_bn(batches, network)
    # update_bn silently skips other classes than PyTorch's.
    assert torch.equal(network.norm1.running_mean, before["norm1.running_mean"])
    update_bn(batches, to_torch(network))
    means = [network.conv1(batch).mean((0, 2, 3)) for batch in batches]
    expected = torch.stack(means).mean(0)
    torch.testing.assert_close(from_torch(network).norm1.running_mean, expected)
    assert network.norm1.num_batches_tracked == 5


def test_a_converted_norm_is_folded_into_the_preceding_convolution():
    network = LeNet("custom")
    network(images())
    network.eval()
    folded = fuse_conv_bn_eval(network.conv1, to_torch(copy.deepcopy(network.norm1)))
    expected = network.norm1(network.conv1(images()))
    torch.testing.assert_close(folded(images()), expected, rtol=1e-4, atol=1e-5)


def test_running_statistics_of_a_converted_network_are_removed_for_vmap():
    network = to_torch(LeNet("custom"))
    torch.func.replace_all_batch_norm_modules_(network)
    assert network.norm1.running_mean is None


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_fx_and_jit_script_need_a_converted_network():
    """Both tools fail on the Python code of the layer from scratch."""
    network = LeNet("custom").eval()
    for tool in (torch.fx.symbolic_trace, torch.jit.script):
        # The two tools raise different exceptions.
        with pytest.raises(Exception):  # noqa: B017
            tool(network)
        converted = to_torch(copy.deepcopy(network))
        result = tool(converted)(images())
        torch.testing.assert_close(result, converted(images()))


def test_freezing_with_train_bn_trains_converted_norms_only():
    network = LeNet("custom")
    BaseFinetuning.freeze(network, train_bn=True)
    assert not network.norm1.weight.requires_grad
    network = to_torch(LeNet("custom"))
    BaseFinetuning.freeze(network, train_bn=True)
    assert network.norm1.weight.requires_grad
    assert not network.conv1.weight.requires_grad


def test_subclasses_keep_their_class():
    class NormAndReLU(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    class OwnNormAndReLU(BatchNorm):
        pass

    network = nn.Sequential(NormAndReLU(3), OwnNormAndReLU(3, num_dims=4))
    assert [type(m) for m in from_torch(network)] == [NormAndReLU, OwnNormAndReLU]
    assert [type(m) for m in to_torch(network)] == [NormAndReLU, OwnNormAndReLU]
