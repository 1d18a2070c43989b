"""Layers of PyTorch, torchvision and timm, called as norm(num_features=C, num_dims=D)."""

from math import gcd

import timm.layers
import torchvision
from torch import nn

BY_DIMS = {
    "batch": {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d},
    "instance": {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d},
}


def require(num_dims, *allowed):
    if num_dims not in allowed:
        raise ValueError(f"num_dims must be one of {allowed}, not {num_dims}.")


def torch_batch_norm(num_features, num_dims, **arguments):
    return BY_DIMS["batch"][num_dims](num_features, **arguments)


def torch_instance_norm(num_features, num_dims, **arguments):
    require(num_dims, 3, 4, 5)
    return BY_DIMS["instance"][num_dims](num_features, affine=True, **arguments)


def torch_tracked_instance_norm(num_features, num_dims, **arguments):
    """Evaluation uses running averages over the samples' statistics."""
    return torch_instance_norm(num_features, num_dims, track_running_stats=True, **arguments)


def torch_group_norm(num_features, num_dims, eps=1e-5):
    return nn.GroupNorm(gcd(num_features, 4), num_features, eps)


def torch_layer_norm(num_features, num_dims, eps=1e-5):
    require(num_dims, 2)
    return nn.LayerNorm(num_features, eps)


def torch_rms_norm(num_features, num_dims, eps=1e-5):
    require(num_dims, 2)
    return nn.RMSNorm(num_features, eps)


def torch_local_response_norm(num_features, num_dims):
    require(num_dims, 3, 4, 5)
    return nn.LocalResponseNorm(size=5)


def images_only(layer):
    """Return a function that calls `layer` for 4 dims, and rejects other numbers of dims."""

    def build(num_features, num_dims, **arguments):
        require(num_dims, 4)
        return layer(num_features, **arguments)

    return build


def timm_evo_norm_s0(num_features, num_dims, **arguments):
    require(num_dims, 4)
    return timm.layers.EvoNorm2dS0(num_features, groups=gcd(num_features, 2), **arguments)


def timm_group_norm_1(num_features, num_dims, **arguments):
    return timm.layers.GroupNorm1(num_features, **arguments)


def timm_batch_norm_without_act(num_features, num_dims, **arguments):
    require(num_dims, 4)
    return timm.layers.BatchNormAct2d(num_features, apply_act=False, **arguments)


LAYERS = {
    "torch_batch_norm": torch_batch_norm,
    "torch_instance_norm": torch_instance_norm,
    "torch_tracked_instance_norm": torch_tracked_instance_norm,
    "torch_group_norm": torch_group_norm,
    "torch_layer_norm": torch_layer_norm,
    "torch_rms_norm": torch_rms_norm,
    "torch_local_response_norm": torch_local_response_norm,
    "torchvision_frozen_batch_norm": images_only(torchvision.ops.FrozenBatchNorm2d),
    "torchvision_layer_norm": images_only(torchvision.models.convnext.LayerNorm2d),
    "timm_layer_norm": images_only(timm.layers.LayerNorm2d),
    "timm_group_norm_1": timm_group_norm_1,
    "timm_frn_tlu": images_only(timm.layers.FilterResponseNormTlu2d),
    "timm_frn_act": images_only(timm.layers.FilterResponseNormAct2d),
    "timm_evo_norm_b0": images_only(timm.layers.EvoNorm2dB0),
    "timm_evo_norm_s0": timm_evo_norm_s0,
    "timm_frozen_batch_norm_act": images_only(timm.layers.FrozenBatchNormAct2d),
    "timm_batch_norm_act": images_only(timm.layers.BatchNormAct2d),
    "timm_batch_norm_without_act": timm_batch_norm_without_act,
}

BATCH_NORMS = {"torch_batch_norm": {}, "timm_batch_norm_without_act": {}}
