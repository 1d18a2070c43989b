"""PyTorch's normalization layers, adapted to the call `norm(num_features=..., num_dims=...)`."""

from torch import nn

from bn_lightning.errors import UserError
from bn_lightning.norms.convert import TORCH


def builtin(
    num_features: int,
    num_dims: int,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
    track_running_stats: bool = True,
) -> nn.Module:
    """Build BatchNorm1d after a linear layer, or BatchNorm1d, 2d or 3d after a convolution."""
    return TORCH[num_dims](num_features, eps, momentum, affine, track_running_stats)


def group(
    num_features: int,
    num_dims: int | None = None,
    num_groups: int = 2,
    eps: float = 1e-5,
    affine: bool = True,
) -> nn.Module:
    """Build GroupNorm, which normalizes each sample separately, in training and in eval mode.

    Wu and He, "Group Normalization", 2018, https://arxiv.org/abs/1803.08494.

    Raises:
        UserError: the channels cannot be split into `num_groups` groups of equal size,
            or the groups have one channel after a linear layer.
    """
    # After a linear layer, a group of one channel is one value, and normalizing it
    # always gives 0.
    most = num_features - 1 if num_dims == 2 else num_features
    allowed = [groups for groups in range(1, most + 1) if num_features % groups == 0]
    if num_groups not in allowed:
        raise UserError(
            f"num_groups is {num_groups}, but must be one of {', '.join(map(str, allowed))} for "
            f"{num_features} channels"
            + (f" and {num_dims}-dimensional input." if num_dims is not None else ".")
        )
    return nn.GroupNorm(num_groups, num_features, eps, affine)


def none(num_features: int, num_dims: int | None = None) -> nn.Module:
    """Build an identity layer, for a network without normalization."""
    return nn.Identity()
