"""Norms by name or import path: what is built, and what is rejected."""

import pytest
import torch
from torch import nn

from bn_lightning import BatchNorm, UserError
from bn_lightning.norms import article, registry
from bn_lightning.norms.frozen import FrozenBatchNorm
from bn_lightning.norms.ghost import GhostBatchNorm
from bn_lightning.norms.renorm import BatchRenorm
from bn_lightning.norms.rms import ChannelRMSNorm


def group_norm(num_features, num_dims, num_groups=1):
    return nn.GroupNorm(num_groups, num_features)


def not_a_module(num_features, num_dims):
    return num_features


@pytest.mark.parametrize(
    ("name", "num_dims", "kind"),
    [
        ("custom", 2, BatchNorm),
        ("custom", 4, BatchNorm),
        ("builtin", 2, nn.BatchNorm1d),
        ("builtin", 4, nn.BatchNorm2d),
        ("article", 2, article.BatchNorm),
        ("article", 4, article.BatchNorm),
        ("renorm", 4, BatchRenorm),
        ("ghost", 2, GhostBatchNorm),
        ("frozen", 4, FrozenBatchNorm),
        ("group", 2, nn.GroupNorm),
        ("layer", 2, nn.LayerNorm),
        ("layer", 4, nn.GroupNorm),
        ("instance", 4, nn.InstanceNorm2d),
        ("rms", 2, nn.RMSNorm),
        ("rms", 4, ChannelRMSNorm),
        ("none", 4, nn.Identity),
        ("tests.norms.test_registry.group_norm", 4, nn.GroupNorm),
    ],
)
def test_each_name_builds_its_class(name, num_dims, kind):
    layer = registry.make(name, num_features=6, num_dims=num_dims)
    assert type(layer) is kind
    assert layer(torch.randn(4, 6, 3, 3) if num_dims == 4 else torch.randn(4, 6)).shape[1] == 6


def test_arguments_are_passed_by_keyword():
    # nn.BatchNorm2d(6, 4) would use the 4 as eps.
    assert registry.make("builtin", 6, 4).eps == 1e-5
    assert registry.make("custom", 6, 4, {"eps": 1e-3}).eps == 1e-3
    layer = registry.make("tests.norms.test_registry.group_norm", 6, 4, {"num_groups": 3})
    assert layer.num_groups == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "batch",
            "Use one of custom, builtin, article, renorm, ghost, frozen, group, layer, "
            "instance, rms, none",
        ),
        ("nowhere.Norm", "No module named 'nowhere'"),
        ("torch.nn.NoNorm", "'NoNorm'"),
        ("torch.nn.GroupNorm", r"GroupNorm\(num_groups: int.*\n.*Wrap it"),
        ("torch.nn", "Wrap it"),
        (
            "tests.norms.test_registry.not_a_module",
            "returned an object of type int.\nA norm must return a torch.nn.Module",
        ),
    ],
)
def test_an_object_that_is_not_a_norm_is_rejected(name, message):
    with pytest.raises(UserError, match=message):
        registry.make(name, num_features=6, num_dims=4)


@pytest.mark.parametrize("name", ["custom", "builtin", "article"])
@pytest.mark.parametrize("argument", ["epsilon", "name", "num_features"])
def test_an_unknown_argument_is_rejected_with_the_list_of_arguments(name, argument):
    with pytest.raises(UserError, match=rf"\{{'{argument}': 1\}}\.\n(.*\n)?.* eps=1e-05"):
        registry.make(name, 6, 4, {argument: 1})


# Messages about arguments


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("custom", {"epsilon": 1}, "Did you mean eps?\nIts arguments are eps=1e-05, momentum=0.1,"),
        ("none", {"eps": 1}, "norm_args {'eps': 1}.\nIt takes no arguments."),
        ("ghost", {"batch_size": 1}, "Did you mean virtual_batch_size?"),
        ("group", {"colour": 1}, "norm_args {'colour': 1}.\nIts arguments are "),
    ],
)
def test_a_wrong_argument_is_reported_with_those_that_can_be_set(name, given, expected):
    with pytest.raises(UserError) as refused:
        registry.make(name, 6, 4, given)
    assert expected in str(refused.value)


@pytest.mark.parametrize(
    ("name", "momentum", "expected"),
    [
        ("custom", 0.1, None),
        ("custom", 0.5, None),
        ("custom", 0.9, "The article's momentum 0.9 is --model.norm_args.momentum 0.1"),
        ("builtin", 0.99, "--model.norm_args.momentum 0.01"),
        ("ghost", 0.99, "--model.norm_args.momentum 0.01"),
        ("custom", None, None),
        ("custom", 0, "momentum 0: the running statistics keep their initial values"),
        ("article", 1.0, "keep their initial values"),
        ("article", 0.9, None),
        ("article", 0.1, "A weight of 0.1 of the newest batch is --model.norm_args.momentum 0.9"),
        ("none", 0.9, None),
        ("my_norms.Norm", 0.9, None),
    ],
)
def test_a_momentum_of_the_other_convention_is_noted(name, momentum, expected):
    note = registry.note_on_momentum(name, {"momentum": momentum})
    assert (note is None) == (expected is None)
    assert expected is None or expected in note


def test_without_norm_args_there_is_no_note():
    assert registry.note_on_momentum("custom", None) is None
