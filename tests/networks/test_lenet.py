"""LeNet: architecture, initialization, and its norm, activation and pooling."""

import math

import pytest
import torch
from torch import nn

from bn_lightning import BatchNorm, LeNet, UserError

IMAGES = torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def test_lenet_computes_the_logits_of_the_articles_network():
    """The article lists these layers in one nn.Sequential."""
    tutorial = nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.BatchNorm2d(6), nn.Sigmoid(), nn.AvgPool2d(2, 2),
        nn.Conv2d(6, 16, 5), nn.BatchNorm2d(16), nn.Sigmoid(), nn.AvgPool2d(2, 2), nn.Flatten(),
        nn.Linear(256, 120), nn.BatchNorm1d(120), nn.Sigmoid(),
        nn.Linear(120, 84), nn.BatchNorm1d(84), nn.Sigmoid(), nn.Linear(84, 10),
    )  # fmt: skip
    lenet = LeNet(norm="builtin")
    tutorial.load_state_dict(
        dict(zip(tutorial.state_dict(), lenet.state_dict().values(), strict=True))
    )
    torch.testing.assert_close(lenet(IMAGES), tutorial(IMAGES))


@pytest.mark.parametrize("norm", ["custom", "builtin", "article", "none"])
def test_the_number_of_parameters(norm):
    expected = 44_426 if norm == "none" else 44_878
    assert sum(p.numel() for p in LeNet(norm).parameters()) == expected


def test_a_norm_may_be_a_class_which_is_called_by_keyword():
    lenet = LeNet(BatchNorm, {"momentum": 0.3})
    # The second argument of the class is eps.
    assert (lenet.norm3.eps, lenet.norm3.num_dims, lenet.norm3.momentum) == (1e-5, 2, 0.3)
    with pytest.raises(UserError, match="BatchNorm2d"):
        LeNet(nn.BatchNorm2d)


def test_weights_are_xavier_uniform():
    lenet = LeNet()
    for layer, fan_in, fan_out in ((lenet.conv2, 6 * 25, 16 * 25), (lenet.fc1, 256, 120)):
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_all_norms_start_with_the_same_weights():
    first = []
    for norm in ("custom", "builtin", "article", "none"):
        torch.manual_seed(1)
        first.append(LeNet(norm).fc3.weight)
    assert all(torch.equal(first[0], other) for other in first)


@pytest.mark.parametrize("activation", ["sigmoid", "relu", "tanh", "gelu", "silu"])
@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_activation_and_pooling_are_those_of_the_settings(activation, pooling):
    lenet = LeNet("none", activation=activation, pooling=pooling)
    x = torch.randn(2, 1, 4, 4)
    phi = {"sigmoid": torch.sigmoid, "relu": torch.relu, "tanh": torch.tanh}.get(activation)
    if phi:
        torch.testing.assert_close(lenet.phi(x), phi(x))
    squares = x.unflatten(3, (2, 2)).unflatten(2, (2, 2))  # (N, C, 2, 2, 2, 2)
    expected = squares.mean((3, 5)) if pooling == "avg" else squares.amax((3, 5))
    torch.testing.assert_close(lenet.pool(x), expected)
    assert lenet(IMAGES).shape == (8, 10)
