"""Recognition of norm layers of any class, and of what they declare about themselves."""

import pytest
import torch
from torch import nn

from bn_lightning import BatchNorm, LeNet, from_torch, to_torch
from bn_lightning.norms import article, recognition, registry
from bn_lightning.norms.renorm import BatchRenorm


@pytest.mark.parametrize("norm", registry.NORMS)
def test_norm_layers_of_any_class_are_found(norm):
    # Instance norm cannot be used behind a linear layer, as in LeNet.
    layers = {f"norm{n}": registry.make(norm, 6, 4) for n in (1, 2, 3, 4)}
    network = nn.ModuleDict(layers) if norm == "instance" else LeNet(norm)
    found = list(recognition.layers(network))
    assert found == ([] if norm == "none" else [f"norm{n}" for n in (1, 2, 3, 4)])


def test_other_layers_are_not_recognized_as_norms():
    others = (
        nn.Conv2d(1, 6, 5),
        nn.PReLU(6),
        nn.Linear(4, 4, bias=False),
        nn.Embedding(5, 3),
        nn.GELU(),
    )
    # With one input or output, the weights of these layers are vectors, like those of a norm.
    with_vectors = (
        nn.Linear(4, 1),
        nn.Linear(1, 4),
        nn.Conv1d(1, 1, 3),
        nn.Embedding(1, 3),
        nn.BCELoss(torch.ones(3)),
    )
    assert recognition.layers(nn.Sequential(*others, *with_vectors)) == {}
    norms = nn.Sequential(nn.GroupNorm(2, 6), nn.InstanceNorm2d(6, affine=True))
    assert list(recognition.layers(norms)) == ["0", "1"]


@pytest.mark.parametrize("norm", [BatchNorm, nn.BatchNorm2d])
def test_the_batch_count_is_not_recognized_as_gamma_of_one_channel(norm):
    layer = norm(1)
    layer(torch.randn(5, 1, 3, 3))
    assert recognition.channel_values(layer.state_dict())["gamma"] == 1


class Own(nn.Module):
    """A user's norm with running statistics."""

    def __init__(self, num_features, num_dims):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))


class Declares(Own):
    prefers_channels_last = True
    only_writes_running_stats = True


class DeclaresTheOpposite(nn.BatchNorm2d):
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
        ("ghost", True),
        ("frozen", False),
        ("group", False),
        ("layer", False),
        ("rms", False),
        (f"{__name__}.Own", False),
        (f"{__name__}.Declares", True),
    ],
)
def test_a_network_prefers_channels_last_if_all_its_norms_declare_it(norm, prefers):
    assert recognition.prefers_channels_last(LeNet(norm)) is prefers


@pytest.mark.parametrize(
    ("norm", "norm_args", "prefers"),
    [
        ("custom", {"affine": False, "track_running_stats": False}, True),
        ("builtin", {"affine": False, "track_running_stats": False}, False),
        ("group", {"affine": False}, False),
        ("rms", {"affine": False}, False),
    ],
)
def test_norms_without_parameters_and_buffers_are_considered_too(norm, norm_args, prefers):
    assert recognition.prefers_channels_last(LeNet(norm, norm_args=norm_args)) is prefers


def test_one_norm_without_the_declaration_is_enough_to_lose_channels_last():
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
        (DeclaresTheOpposite(3), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_which_layers_only_write_their_running_statistics(layer, only_writes):
    assert recognition.only_writes_running_stats(layer) is only_writes
    assert recognition.only_writes_running_stats(nn.Sequential(BatchNorm(3), layer)) is only_writes


def test_layers_without_running_statistics_do_not_read_them():
    assert recognition.only_writes_running_stats(nn.Linear(3, 3))
    assert recognition.only_writes_running_stats(nn.GroupNorm(1, 3))
