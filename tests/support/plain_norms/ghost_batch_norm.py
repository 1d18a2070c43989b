"""Ghost batch normalization, Hoffer, Hubara and Soudry 2017: small virtual batches in training."""

import torch
from torch import nn


class GhostBatchNorm(nn.Module):
    def __init__(self, num_features, num_dims, virtual_batch_size=8, eps=1e-5, momentum=0.1):
        super().__init__()
        self.virtual_batch_size = virtual_batch_size
        self.eps = eps
        self.momentum = momentum
        self.axes = [0, *range(2, num_dims)]
        shape = [1, num_features, *[1] * (num_dims - 2)]
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))
        self.register_buffer("running_mean", torch.zeros(shape))
        self.register_buffer("running_var", torch.ones(shape))

    def forward(self, x):
        dtype = x.dtype
        x = x.to(torch.promote_types(dtype, torch.float32))
        if self.training and len(x) > 0:
            batches = x.split(self.virtual_batch_size)
            x_hat = torch.cat([self.normalize(batch) for batch in batches])
        else:
            x_hat = (x - self.running_mean) / torch.sqrt(self.running_var + self.eps)
        return (self.weight * x_hat + self.bias).to(dtype)

    def normalize(self, x):
        m = x.numel() // x.size(1)
        mean = x.mean(self.axes, keepdim=True)
        var = (x - mean).square().mean(self.axes, keepdim=True)
        with torch.no_grad():
            unbiased_var = var * m / max(m - 1, 1)
            self.running_mean += self.momentum * (mean - self.running_mean)
            self.running_var += self.momentum * (unbiased_var - self.running_var)
        return (x - mean) / torch.sqrt(var + self.eps)
