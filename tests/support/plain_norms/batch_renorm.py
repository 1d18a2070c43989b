"""Batch renormalization, Ioffe 2017, algorithm 1. The names follow the paper."""

import torch
from torch import nn


class BatchRenorm(nn.Module):
    def __init__(
        self, num_features, num_dims, eps=1e-5, momentum=0.1, r_max=3.0, d_max=5.0, warmup=0
    ):
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.r_max = r_max
        self.d_max = d_max
        self.warmup = warmup
        self.axes = [0, *range(2, num_dims)]
        shape = [1, num_features, *[1] * (num_dims - 2)]
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))
        self.register_buffer("running_mean", torch.zeros(shape))
        self.register_buffer("running_std", torch.ones(shape))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x):
        dtype = x.dtype
        x = x.to(torch.promote_types(dtype, torch.float32))
        if self.training and len(x) > 0:
            x_hat = self.renormalize(x)
        else:
            x_hat = (x - self.running_mean) / self.running_std
        return (self.weight * x_hat + self.bias).to(dtype)

    def renormalize(self, x):
        mean = x.mean(self.axes, keepdim=True)
        var = (x - mean).square().mean(self.axes, keepdim=True)
        std = torch.sqrt(var + self.eps)
        # The limits grow from 1 and 0, which is batch normalization.
        progress = 1.0
        if self.num_batches_tracked < self.warmup:
            progress = self.num_batches_tracked.item() / self.warmup
        r_max = 1 + progress * (self.r_max - 1)
        d_max = progress * self.d_max
        with torch.no_grad():
            r = (std / self.running_std).clamp(1 / r_max, r_max)
            d = ((mean - self.running_mean) / self.running_std).clamp(-d_max, d_max)
            self.running_mean += self.momentum * (mean - self.running_mean)
            self.running_std += self.momentum * (std - self.running_std)
            self.num_batches_tracked += 1
        return (x - mean) / std * r + d
