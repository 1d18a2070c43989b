"""Batch normalization, Ioffe and Szegedy 2015, with the options of PyTorch's layer."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce


class BatchNorm(nn.Module):
    def __init__(self, num_features, num_dims, eps=1e-5, momentum=0.1):
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.sync_batchnorm = False
        self.axes = [0, *range(2, num_dims)]
        self.shape = [1, num_features, *[1] * (num_dims - 2)]
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def reset_running_stats(self):
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def forward(self, x):
        dtype = x.dtype
        x = x.to(torch.promote_types(dtype, torch.float32))
        if self.training:
            mean, var = self.batch_statistics(x)
        else:
            mean, var = self.running_mean.view(self.shape), self.running_var.view(self.shape)
        x_hat = (x - mean) / torch.sqrt(var + self.eps)
        y = self.weight.view(self.shape) * x_hat + self.bias.view(self.shape)
        return y.to(dtype)

    def batch_statistics(self, x):
        synchronized = self.sync_batchnorm and dist.is_initialized()
        m = x.new_tensor(x.numel() / x.size(1))
        sums = x.sum(self.axes, keepdim=True)
        if synchronized:
            m = all_reduce(m)
            sums = all_reduce(sums)
        if m == 1:
            raise ValueError("In training, each channel must have more than one value.")
        mean = sums / m.clamp(min=1)
        squares = (x - mean).square().sum(self.axes, keepdim=True)
        if synchronized:
            squares = all_reduce(squares)
        var = squares / m.clamp(min=1)
        self.update_running_stats(mean.detach(), squares.detach() / (m - 1), m)
        return mean, var

    def update_running_stats(self, mean, unbiased_var, m):
        self.num_batches_tracked += 1
        # An empty batch has no statistics.
        if m == 0:
            return
        factor = self.momentum
        if factor is None:
            factor = 1 / self.num_batches_tracked.item()
        self.running_mean += factor * (mean.flatten() - self.running_mean)
        self.running_var += factor * (unbiased_var.flatten() - self.running_var)
