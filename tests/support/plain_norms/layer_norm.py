"""Layer normalization, Ba, Kiros and Hinton 2016: over all values of a sample."""

import torch
from torch import nn


class LayerNorm(nn.Module):
    def __init__(self, num_features, num_dims, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.axes = [1, *range(2, num_dims)]
        shape = [num_features, *[1] * (num_dims - 2)]
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, x):
        dtype = x.dtype
        x = x.to(torch.promote_types(dtype, torch.float32))
        mean = x.mean(self.axes, keepdim=True)
        var = (x - mean).square().mean(self.axes, keepdim=True)
        x_hat = (x - mean) * (var + self.eps).rsqrt()
        return (self.weight * x_hat + self.bias).to(dtype)
