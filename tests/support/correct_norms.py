"""Correct normalization layers of many kinds, each as its author would write it.

A layer is built by `LAYERS[name](num_features=C, num_dims=D)` for inputs (N, C), (N, C, L),
(N, C, H, W) or (N, C, D, H, W). It raises ValueError for a number of dims that it does not
support. `BATCH_NORMS` is described in tests.support.correct_batch_norms.
"""

from math import gcd

import torch
import torch.nn.functional as F
from torch import nn

from tests.support import correct_batch_norms, library_norms
from tests.support.library_norms import require
from tests.support.planted_bases import (
    BatchNorm,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    RMSNorm,
    at_least_float32,
    batch_axes,
    per_channel,
)


class LlamaRMSNorm(nn.Module):
    """RMSNorm of LLaMA (Touvron et al. 2023) over the last dim of (N, C), in float32.

    With float32 parameters, the product with gamma makes a bfloat16 input float32.
    """

    def __init__(self, num_features, num_dims, eps=1e-6):
        super().__init__()
        require(num_dims, 2)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features))

    def forward(self, x):
        wide = x.float()
        x_hat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return x_hat.type_as(x) * self.weight


class LlamaRMSNormOfChannels(nn.Module):
    """The same over dim 1, for feature maps. The result always has the dtype of the input."""

    def __init__(self, num_features, num_dims, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features))

    def forward(self, x):
        wide = x.float()
        x_hat = wide * torch.rsqrt(wide.pow(2).mean(1, keepdim=True) + self.eps)
        return (x_hat * per_channel(self.weight, x).float()).to(x.dtype)


class T5LayerNorm(nn.Module):
    """RMSNorm of T5 (Raffel et al. 2020) over the last dim of (N, C).

    Only the variance is computed in float32. The result has the dtype of the parameters if that
    is a half precision one.
    """

    def __init__(self, num_features, num_dims, eps=1e-6):
        super().__init__()
        require(num_dims, 2)
        self.weight = nn.Parameter(torch.ones(num_features))
        self.variance_epsilon = eps

    def forward(self, x):
        variance = x.float().square().mean(-1, keepdim=True)
        x = x * (variance + self.variance_epsilon).rsqrt()
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            x = x.to(self.weight.dtype)
        return self.weight * x


class T5LayerNormOfChannels(nn.Module):
    """The same over dim 1, for feature maps; the result has the dtype of the input."""

    def __init__(self, num_features, num_dims, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.variance_epsilon = eps

    def forward(self, x):
        variance = x.float().square().mean(1, keepdim=True)
        x_hat = x * (variance + self.variance_epsilon).rsqrt()
        return (per_channel(self.weight, x) * x_hat).to(x.dtype)


class ConvNextLayerNorm(nn.Module):
    """Layer normalization over the channels of each position (ConvNeXt, Liu et al. 2022)."""

    def __init__(self, num_features, num_dims, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.eps = eps

    def forward(self, x):
        wide = at_least_float32(x)
        mean = wide.mean(1, keepdim=True)
        variance = (wide - mean).pow(2).mean(1, keepdim=True)
        x_hat = (wide - mean) / torch.sqrt(variance + self.eps)
        return (per_channel(self.weight, x) * x_hat + per_channel(self.bias, x)).to(x.dtype)


class WeightStandardizedConv(nn.Module):
    """A convolution C -> C whose filters have zero mean and unit variance (Qiao et al. 2019).

    Group normalization follows. The kernel has 3 positions in each dim, and padding keeps the
    size.
    """

    def __init__(self, num_features, num_dims):
        super().__init__()
        require(num_dims, 3, 4, 5)
        kernel = [3] * (num_dims - 2)
        self.weight = nn.Parameter(torch.randn(num_features, num_features, *kernel))
        self.conv = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[num_dims]
        self.norm = self.build_norm(num_features, num_dims)

    def build_norm(self, num_features, num_dims):
        return nn.GroupNorm(gcd(num_features, 2), num_features)

    def forward(self, x):
        var, mean = torch.var_mean(self.weight, list(range(1, x.dim())), correction=0, keepdim=True)
        return self.norm(self.conv(x, (self.weight - mean) / (var + 1e-5).sqrt(), padding=1))


class WeightStandardizedConvWithBatchNorm(WeightStandardizedConv):
    """The same for images, with batch normalization after it."""

    def __init__(self, num_features, num_dims):
        require(num_dims, 4)
        super().__init__(num_features, num_dims)

    def build_norm(self, num_features, num_dims):
        return BatchNorm(num_features, num_dims)


class MovingRms(BatchNorm):
    """Batch normalization without centring: divide by the root mean square of the channel."""

    def register_statistics(self, num_features):
        self.register_buffer("running_square", torch.ones(num_features))

    def reset_running_stats(self):
        self.running_square.fill_(1)

    def training_moments(self, x):
        square = x.square().mean(batch_axes(x), keepdim=True)
        if x.numel():
            self.move("running_square", square)
        return 0, square

    def running_moments(self, x):
        return 0, per_channel(self.running_square, x)


class AlwaysMovingRms(MovingRms):
    """Both modes divide by the running value of the batches before.

    PowerNorm (Shen et al. 2020) has this forward pass. Here the derivative is the exact one.
    """

    def training_moments(self, x):
        before = self.running_square.clone()
        super().training_moments(x)
        return 0, per_channel(before, x)


class GhostBatchNorm(BatchNorm):
    """Normalize each part of at most 4 samples by itself (Hoffer, Hubara and Soudry 2017)."""

    virtual_batch_size = 4

    def normalize(self, x):
        if not self.training or not len(x):
            return super().normalize(x)
        parts = x.tensor_split(-(-len(x) // self.virtual_batch_size))
        return torch.cat([super(GhostBatchNorm, self).normalize(part) for part in parts])


class GhostBatchNorm8(GhostBatchNorm):
    virtual_batch_size = 8


class FrozenBatchNorm(BatchNorm):
    """All state is constant, also in training mode; the layer has no parameters."""

    def __init__(self, num_features, num_dims, eps=1e-5):
        super().__init__(num_features, num_dims, eps)
        del self.weight, self.bias
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))

    def normalize(self, x):
        return self.standardize(x, *self.running_moments(x))


class BatchRenorm(BatchNorm):
    """Batch renormalization (Ioffe 2017, algorithm 1). r and d are constants in the backward pass.

    During the warm-up, r is 1 and d is 0.
    """

    warmup = 0

    def normalize(self, x):
        if not self.training:
            return super().normalize(x)

        old_mean, old_var = (moment.clone() for moment in self.running_moments(x))
        mean, var = self.training_moments(x)
        warm = self.num_batches_tracked > self.warmup
        with torch.no_grad():
            old_std = (old_var + self.eps).sqrt()
            r = ((var + self.eps).sqrt() / old_std).clamp(1 / 3, 3)
            d = ((mean - old_mean) / old_std).clamp(-5, 5)
        x_hat = self.standardize(x, mean, var)
        return torch.where(warm, x_hat * r + d, x_hat)


class BatchRenormWithWarmup(BatchRenorm):
    warmup = 500


LAYERS = {
    "llama_rms_norm": LlamaRMSNorm,
    "llama_rms_norm_of_channels": LlamaRMSNormOfChannels,
    "t5_layer_norm": T5LayerNorm,
    "t5_layer_norm_of_channels": T5LayerNormOfChannels,
    "rms_norm_with_bias": RMSNorm,
    "convnext_layer_norm": ConvNextLayerNorm,
    "layer_norm_of_samples": LayerNorm,
    "instance_norm": InstanceNorm,
    "group_norm": GroupNorm,
    "weight_standardized_conv": WeightStandardizedConv,
    "weight_standardized_conv_with_batch_norm": WeightStandardizedConvWithBatchNorm,
    "moving_rms": MovingRms,
    "always_moving_rms": AlwaysMovingRms,
    "ghost_4": GhostBatchNorm,
    "ghost_8": GhostBatchNorm8,
    "frozen": FrozenBatchNorm,
    "batch_renorm": BatchRenorm,
    "batch_renorm_with_warmup": BatchRenormWithWarmup,
    **correct_batch_norms.LAYERS,
    **library_norms.LAYERS,
}

BATCH_NORMS = correct_batch_norms.BATCH_NORMS
