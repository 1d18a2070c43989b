import pytest
import torch
from torch import nn

from bn_lightning import BatchNorm, UserError
from bn_lightning.norms import article, registry
from bn_lightning.norms.renorm import BatchRenorm


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
        ("group", 2, nn.GroupNorm),
        ("none", 4, nn.Identity),
        ("tests.norms.test_registry.group_norm", 4, nn.GroupNorm),
    ],
)
def test_names(name, num_dims, kind):
    layer = registry.make(name, num_features=6, num_dims=num_dims)
    assert type(layer) is kind
    assert layer(torch.randn(4, 6, 3, 3) if num_dims == 4 else torch.randn(4, 6)).shape[1] == 6


def test_arguments_arrive_by_keyword():
    assert (
        registry.make("builtin", 6, 4).eps == 1e-5
    )  # nn.BatchNorm2d(6, 4) would have taken the 4 for eps
    assert registry.make("custom", 6, 4, {"eps": 1e-3}).eps == 1e-3
    assert (
        registry.make("tests.norms.test_registry.group_norm", 6, 4, {"num_groups": 3}).num_groups
        == 3
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("batch", "There are custom, builtin, article, renorm, group, none"),
        ("nowhere.Norm", "No module named 'nowhere'"),
        ("torch.nn.NoNorm", "'NoNorm'"),
        ("torch.nn.GroupNorm", r"GroupNorm\(num_groups: int.*\n.*Wrap it"),
        ("torch.nn", "Wrap it"),
        ("tests.norms.test_registry.not_a_module", "it must give a torch.nn.Module"),
    ],
)
def test_what_is_no_norm_is_refused(name, said):
    with pytest.raises(UserError, match=said):
        registry.make(name, num_features=6, num_dims=4)


@pytest.mark.parametrize("name", ["custom", "builtin", "article"])
@pytest.mark.parametrize("argument", ["epsilon", "name", "num_features"])
def test_unknown_arguments_are_refused_with_the_known_ones(name, argument):
    with pytest.raises(UserError, match=rf"\{{'{argument}': 1\}}.*eps: float"):
        registry.make(name, 6, 4, {argument: 1})
