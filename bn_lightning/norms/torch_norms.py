"""PyTorch's own normalization layers, called as `norm(num_features=..., num_dims=...)`."""

from torch import nn

from bn_lightning.errors import UserError


def builtin(
    num_features: int,
    num_dims: int,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
    track_running_stats: bool = True,
) -> nn.Module:
    """Build BatchNorm1d behind a linear layer and BatchNorm2d behind a convolution."""
    layer = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d}[num_dims]
    return layer(num_features, eps, momentum, affine, track_running_stats)


def group(
    num_features: int, num_dims: int, num_groups: int = 2, eps: float = 1e-5, affine: bool = True
) -> nn.Module:
    """Build GroupNorm, which normalizes each sample by itself, in training as in eval mode.

    Wu and He, "Group Normalization", 2018, https://arxiv.org/abs/1803.08494.

    Raises:
        UserError: channels that cannot be split into `num_groups` of the same size; or, behind a
            linear layer, groups of one channel: a value normalized by itself is always 0.
    """
    most = num_features if num_dims == 4 else num_features - 1
    allowed = [groups for groups in range(1, most + 1) if num_features % groups == 0]
    if num_groups not in allowed:
        raise UserError(
            f"num_groups is {num_groups}; for a layer of {num_features} channels it must be one of "
            f"{', '.join(map(str, allowed))}: --model.norm_args.num_groups 2"
        )
    return nn.GroupNorm(num_groups, num_features, eps, affine)


def none(num_features: int, num_dims: int) -> nn.Module:
    """Build no normalization: the layer returns its input."""
    return nn.Identity()
