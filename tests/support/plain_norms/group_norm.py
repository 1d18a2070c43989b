"""Group normalization, Wu and He 2018: the channels of a sample are normalized in groups."""

import torch
from torch import nn


class GroupNorm(nn.Module):
    def __init__(self, num_features, num_dims, num_groups=2, eps=1e-5):
        super().__init__()
        if num_features % num_groups != 0:
            raise ValueError(f"{num_features} channels do not form {num_groups} equal groups.")
        self.num_groups = num_groups
        self.eps = eps
        self.shape = [1, num_features, *[1] * (num_dims - 2)]
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        groups = wide.unflatten(1, (self.num_groups, -1)).flatten(2)  # (N, groups, values)
        mean = groups.mean(2, keepdim=True)
        var = (groups - mean).square().mean(2, keepdim=True)
        x_hat = ((groups - mean) / torch.sqrt(var + self.eps)).reshape(x.shape)
        y = x_hat * self.weight.view(self.shape) + self.bias.view(self.shape)
        return y.to(x.dtype)
