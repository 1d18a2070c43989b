"""PyTorch's normalization layers, adapted to the call `norm(num_features=..., num_dims=...)`."""

from torch import nn

from bn_lightning.errors import UserError
from bn_lightning.norms.convert import TORCH
from bn_lightning.norms.shape_rules import require_num_dims, require_several_channels

INSTANCE = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}


def builtin(
    num_features: int,
    num_dims: int,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
    track_running_stats: bool = True,
) -> nn.Module:
    """Build BatchNorm1d after a linear layer, or BatchNorm1d, 2d or 3d after a convolution.

    Raises:
        UserError: `num_dims` is not from 2 to 5.
    """
    require_num_dims("builtin", num_dims)
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
    if num_dims == 2:
        require_several_channels("group", num_features, "behind a linear layer")
    most = num_features - 1 if num_dims == 2 else num_features
    allowed = [groups for groups in range(1, most + 1) if num_features % groups == 0]
    if num_groups not in allowed:
        raise UserError(
            f"num_groups is {num_groups}, but must be one of {', '.join(map(str, allowed))} for "
            f"{num_features} channels"
            + (f" and {num_dims}-dimensional input." if num_dims is not None else ".")
        )
    return nn.GroupNorm(num_groups, num_features, eps, affine)


def layer(num_features: int, num_dims: int, eps: float = 1e-5, affine: bool = True) -> nn.Module:
    """Build LayerNorm after a linear layer, or GroupNorm with one group after a convolution.

    Each sample is normalized by the mean and variance of all its values, over channels
    and positions. gamma and beta have one value per channel. Ba, Kiros and Hinton,
    "Layer Normalization", 2016, https://arxiv.org/abs/1607.06450.

    Raises:
        UserError: `num_dims` is not from 2 to 5, or there is one channel after a linear
            layer.
    """
    require_num_dims("layer", num_dims)
    if num_dims == 2:
        require_several_channels("layer", num_features, "behind a linear layer")
        return nn.LayerNorm(num_features, eps, affine)
    return nn.GroupNorm(1, num_features, eps, affine)


def instance(
    num_features: int,
    num_dims: int,
    eps: float = 1e-5,
    momentum: float = 0.1,
    affine: bool = True,
    track_running_stats: bool = False,
) -> nn.Module:
    """Build InstanceNorm1d, 2d or 3d, which normalizes each channel of each sample.

    Ulyanov, Vedaldi and Lempitsky, "Instance Normalization: The Missing Ingredient for
    Fast Stylization", 2016, https://arxiv.org/abs/1607.08022.

    Raises:
        UserError: the norm is for a linear layer, or `num_dims` is not from 3 to 5.
    """
    # InstanceNorm1d would take (N, C) for a single sample with N channels.
    if num_dims == 2:
        raise UserError(
            "The norm 'instance' cannot be used behind a linear layer (num_dims 2); it needs "
            "num_dims 3, 4 or 5.\n"
            "Behind it, each sample has one value per channel, and normalizing it always gives 0.\n"
            "Use --model.norm layer or group, or a network whose norms are all behind "
            "convolutions, such as --model.network resnet.\n"
            "For another norm in the linear layers only, write this function, for example in "
            "my_norms.py, and use --model.norm my_norms.instance_or_layer\n\n"
            "    from bn_lightning.norms import torch_norms\n\n"
            "    def instance_or_layer(num_features, num_dims):\n"
            "        norm = torch_norms.layer if num_dims == 2 else torch_norms.instance\n"
            "        return norm(num_features, num_dims)\n"
        )
    require_num_dims("instance", num_dims, INSTANCE)
    return INSTANCE[num_dims](num_features, eps, momentum, affine, track_running_stats)


def none(num_features: int, num_dims: int | None = None) -> nn.Module:
    """Build an identity layer, for a network without normalization."""
    return nn.Identity()
