"""Instance normalization, Ulyanov et al. 2016, with running statistics as PyTorch's layer."""

import torch
from torch import nn


class InstanceNorm(nn.Module):
    def __init__(self, num_features, num_dims, eps=1e-5, momentum=0.1):
        super().__init__()
        if num_dims < 3:
            raise ValueError("Instance normalization needs input with positions, (N, C, ...).")
        self.eps = eps
        self.momentum = momentum
        self.axes = [*range(2, num_dims)]
        shape = [num_features, *[1] * (num_dims - 2)]
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))
        self.register_buffer("running_mean", torch.zeros(shape))
        self.register_buffer("running_var", torch.ones(shape))

    def reset_running_stats(self):
        self.running_mean.zero_()
        self.running_var.fill_(1)

    def forward(self, x):
        dtype = x.dtype
        x = x.to(torch.promote_types(dtype, torch.float32))
        mean, var = self.running_mean, self.running_var
        if self.training:
            var, mean = torch.var_mean(x, self.axes, correction=0, keepdim=True)  # (N, C, 1, ...)
            if len(x) > 0:
                m = x.shape[2:].numel()
                unbiased_var = var * m / max(m - 1, 1)
                self.running_mean.lerp_(mean.detach().mean(0).to(self.running_mean), self.momentum)
                self.running_var.lerp_(
                    unbiased_var.detach().mean(0).to(self.running_var), self.momentum
                )
        y = self.weight * (x - mean) / torch.sqrt(var + self.eps) + self.bias
        return y.to(dtype)
