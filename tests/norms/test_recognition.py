"""Norm layers are found whatever their class, and what they declare is known of the network."""

import pytest
import torch
from torch import nn

from bn_lightning import BatchNorm, LeNet, from_torch, to_torch
from bn_lightning.norms import article, recognition, registry
from bn_lightning.norms.renorm import BatchRenorm


@pytest.mark.parametrize("norm", registry.NORMS)
def test_layers_are_found_whatever_their_class(norm):
    found = list(recognition.layers(LeNet(norm)))
    assert found == ([] if norm == "none" else [f"norm{n}" for n in (1, 2, 3, 4)])


def test_no_layer_without_statistics_of_channels_is_taken_for_a_norm():
    others = (
        nn.Conv2d(1, 6, 5),
        nn.PReLU(6),
        nn.Linear(4, 4, bias=False),
        nn.Embedding(5, 3),
        nn.GELU(),
    )
    with_one = (
        nn.Linear(4, 1),
        nn.Linear(1, 4),
        nn.Conv1d(1, 1, 3),
        nn.Embedding(1, 3),
        nn.BCELoss(torch.ones(3)),
    )
    assert recognition.layers(nn.Sequential(*others, *with_one)) == {}
    norms = nn.Sequential(nn.GroupNorm(2, 6), nn.InstanceNorm2d(6, affine=True))
    assert list(recognition.layers(norms)) == ["0", "1"]


@pytest.mark.parametrize("norm", [BatchNorm, nn.BatchNorm2d])
def test_one_channel(norm):
    layer = norm(1)
    layer(torch.randn(5, 1, 3, 3))
    assert recognition.by_channel(layer.state_dict())["gamma"] == 1  # not the count of batches


class Own(nn.Module):
    """A norm of a user's, with running statistics."""

    def __init__(self, num_features, num_dims):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))


class Declares(Own):
    prefers_channels_last = True
    only_writes_running_stats = True


class DeclaresNot(nn.BatchNorm2d):
    only_writes_running_stats = False


@pytest.mark.parametrize(
    ("norm", "prefers"),
    [
        ("custom", True),
        ("bn_lightning.BatchNorm", True),
        ("none", True),
        ("builtin", False),
        ("article", False),
        ("renorm", False),
        ("group", False),
        (f"{__name__}.Own", False),
        (f"{__name__}.Declares", True),
    ],
)
def test_channels_last_is_preferred_if_every_norm_declares_it(norm, prefers):
    assert recognition.prefers_channels_last(LeNet(norm)) is prefers


@pytest.mark.parametrize(
    ("norm", "norm_args", "prefers"),
    [
        ("custom", {"affine": False, "track_running_stats": False}, True),
        ("builtin", {"affine": False, "track_running_stats": False}, False),
        ("group", {"affine": False}, False),
    ],
)
def test_a_norm_of_torchs_that_keeps_nothing_does_not_prefer_channels_last(
    norm, norm_args, prefers
):
    assert recognition.prefers_channels_last(LeNet(norm, norm_args=norm_args)) is prefers


def test_one_norm_that_does_not_prefer_channels_last_decides():
    norms = nn.Sequential(BatchNorm(3, num_dims=4), BatchNorm(3, num_dims=4))
    assert recognition.prefers_channels_last(norms)
    assert not recognition.prefers_channels_last(nn.Sequential(norms, nn.BatchNorm2d(3)))
    assert not recognition.prefers_channels_last(to_torch(norms))
    assert recognition.prefers_channels_last(from_torch(norms))


@pytest.mark.parametrize(
    ("layer", "only_writes"),
    [
        (BatchNorm(3), True),
        (article.BatchNorm(3, num_dims=4), True),
        (nn.BatchNorm1d(3), True),
        (nn.BatchNorm2d(3), True),
        (nn.BatchNorm3d(3), True),
        (nn.SyncBatchNorm(3), True),
        (Declares(3, num_dims=4), True),
        (BatchRenorm(3), False),
        (nn.InstanceNorm2d(3, track_running_stats=True), False),
        (Own(3, num_dims=4), False),
        (DeclaresNot(3), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_who_only_writes_running_statistics(layer, only_writes):
    assert recognition.only_writes_running_stats(layer) is only_writes
    assert recognition.only_writes_running_stats(nn.Sequential(BatchNorm(3), layer)) is only_writes


def test_without_running_statistics_nobody_reads_them():
    assert recognition.only_writes_running_stats(nn.Linear(3, 3))
    assert recognition.only_writes_running_stats(nn.GroupNorm(1, 3))
