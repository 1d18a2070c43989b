"""The residual network for small images."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bn_lightning import BatchNorm, FashionMNIST
from bn_lightning.networks.registry import ImageShape, build

CIFAR = ImageShape(3, (32, 32), 10)


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)])
def test_the_number_of_parameters_is_that_of_the_paper(depth, millions):
    """Table 6 of He et al. 2016."""
    network = build("resnet", CIFAR, "custom", network_args={"depth": depth})
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == millions
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth


def test_a_block_adds_its_input_with_zeros_in_the_new_channels():
    network = build("resnet", CIFAR, "none", network_args={"depth": 8, "width": 4})
    block = network.blocks[1]
    x = torch.rand(2, 4, 8, 6)
    y = block.conv2(F.relu(block.conv1(x)))
    shortcut = torch.zeros(2, 8, 4, 3)
    shortcut[:, :4] = x[:, :, ::2, ::2]
    torch.testing.assert_close(block(x), F.relu(y + shortcut))


def test_the_sizes_of_the_three_stages():
    network = build("resnet", CIFAR, "custom", network_args={"depth": 14, "width": 8})
    shapes = []
    for block in network.blocks:
        block.register_forward_hook(lambda _, args, y: shapes.append(tuple(y.shape[1:])))
    network(torch.rand(2, 3, 32, 32))
    assert shapes == [(8, 32, 32)] * 2 + [(16, 16, 16)] * 2 + [(32, 8, 8)] * 2


def test_weights_have_the_deviation_of_he_et_al_2015():
    network = build("resnet", CIFAR, "custom")
    weight = network.blocks[-1].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)


@pytest.mark.parametrize("norm", ["builtin", "custom", "group", "article", "renorm"])
def test_all_norms_start_with_the_same_weights(norm):
    torch.manual_seed(0)
    expected = build("resnet", CIFAR, "none", network_args={"depth": 8}).fc.weight
    torch.manual_seed(0)
    network = build("resnet", CIFAR, norm, network_args={"depth": 8})
    assert torch.equal(network.fc.weight, expected)
    assert sum(isinstance(m, BatchNorm) for m in network.modules()) == (
        7 if norm == "custom" else 0
    )


@pytest.mark.slow
def test_custom_and_builtin_have_the_same_first_ten_losses():
    data = FashionMNIST("sample", batch_size=32)
    data.prepare_data()
    data.setup("fit")
    batches = [batch for batch, _ in zip(data.train_dataloader(), range(10), strict=False)]
    losses = []
    for norm in ("custom", "builtin"):
        torch.manual_seed(0)
        network = build("resnet", ImageShape(1, (28, 28), 10), norm)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
        losses.append([])
        for x, y in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(network(x), y)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
