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


def test_there_and_back():
    network = LeNet("custom")
    network(images())
    expected = copy.deepcopy(network).eval()(images(seed=1))
    tensors = {name: id(t) for name, t in (*network.named_parameters(), *network.named_buffers())}
    to_torch(network)
    assert [type(norm) for norm in (network.norm1, network.norm3)] == [
        nn.BatchNorm2d,
        nn.BatchNorm1d,
    ]
    torch.testing.assert_close(network.eval()(images(seed=1)), expected)
    from_torch(network)
    assert sum(type(module) is BatchNorm for module in network.modules()) == 4
    torch.testing.assert_close(network.eval()(images(seed=1)), expected)
    assert {
        name: id(t) for name, t in (*network.named_parameters(), *network.named_buffers())
    } == tensors


def test_a_layer_alone():
    assert type(to_torch(BatchNorm(3, num_dims=5))) is nn.BatchNorm3d
    assert from_torch(nn.BatchNorm2d(3)).num_dims == 4


def test_a_rank_that_is_not_told_is_refused_and_nothing_changed():
    layers = nn.Sequential(BatchNorm(3, num_dims=4), BatchNorm(3))
    with pytest.raises(ValueError, match="num_dims"):
        to_torch(layers)
    assert type(layers[0]) is BatchNorm


def test_update_bn_estimates_the_statistics_of_a_converted_network():
    batches = [images(seed=seed) for seed in range(5)]
    network = LeNet("custom")
    untouched = copy.deepcopy(network.state_dict())
    update_bn(batches, network)
    assert torch.equal(
        network.norm1.running_mean, untouched["norm1.running_mean"]
    )  # passed by, without a word
    update_bn(batches, to_torch(network))
    expected = torch.stack([network.conv1(batch).mean((0, 2, 3)) for batch in batches]).mean(0)
    torch.testing.assert_close(from_torch(network).norm1.running_mean, expected)
    assert network.norm1.num_batches_tracked == 5


def test_folding_into_the_layer_before_it():
    network = LeNet("custom")
    network(images())
    network.eval()
    folded = fuse_conv_bn_eval(network.conv1, to_torch(copy.deepcopy(network.norm1)))
    torch.testing.assert_close(
        folded(images()), network.norm1(network.conv1(images())), rtol=1e-4, atol=1e-5
    )


def test_replacement_for_vmap():
    network = to_torch(LeNet("custom"))
    torch.func.replace_all_batch_norm_modules_(network)
    assert network.norm1.running_mean is None


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_tracing_and_scripting():
    """They trace through a layer that is not torch's, and stop at its Python; a converted network passes."""
    network = LeNet("custom").eval()
    for tool in (torch.fx.symbolic_trace, torch.jit.script):
        with pytest.raises(Exception):  # noqa: B017  # each has an error of its own
            tool(network)
        converted = to_torch(copy.deepcopy(network))
        torch.testing.assert_close(tool(converted)(images()), converted(images()))


def test_freezing():
    network = LeNet("custom")
    BaseFinetuning.freeze(network, train_bn=True)
    assert not network.norm1.weight.requires_grad
    network = to_torch(LeNet("custom"))
    BaseFinetuning.freeze(network, train_bn=True)
    assert network.norm1.weight.requires_grad
    assert not network.conv1.weight.requires_grad
