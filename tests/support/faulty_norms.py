"""Norms for tests of `check`: a correct one, and subclasses with one bug each."""

import torch
import torch.distributed as dist
from torch import nn


class Plain(nn.Module):
    """Batch normalization. Each subclass overrides one method with a bug."""

    def __init__(self, num_features, num_dims, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.shape = (1, num_features, *[1] * (num_dims - 2))
        self.axes = [d for d in range(num_dims) if d != 1]
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register("running_mean", torch.zeros(num_features))
        self.register("running_var", torch.ones(num_features))
        self.register("num_batches_tracked", torch.tensor(0))

    def register(self, name, value):
        self.register_buffer(name, value)

    def moments(self, x):
        mean = x.mean(self.axes, keepdim=True)
        return mean, (x - mean).square().mean(self.axes, keepdim=True)

    def update_running_stats(self, x, mean, var):
        m = x.numel() // x.size(1)
        self.running_mean.lerp_(mean.detach().flatten(), 0.1)
        self.running_var.lerp_(var.detach().flatten() * m / (m - 1), 0.1)
        self.num_batches_tracked += 1

    def eval_moments(self, x):
        return self.running_mean.view(self.shape), self.running_var.view(self.shape)

    def forward(self, x):
        dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
        if self.training:
            mean, var = self.moments(x)
            self.update_running_stats(x, mean, var)
        else:
            mean, var = self.eval_moments(x)
        x_hat = (x - mean) / (var + self.eps).sqrt()
        return (x_hat * self.weight.view(self.shape) + self.bias.view(self.shape)).to(dtype)


class WrongAxis(Plain):
    def moments(self, x):
        # The width is missing.
        self.axes = self.axes[:2]
        return super().moments(x)

    def update_running_stats(self, x, mean, var):
        if x.dim() == 4:
            mean, var = mean.mean(3), var.mean(3)
        super().update_running_stats(x, mean, var)


class StatisticsAreNotBuffers(Plain):
    def register(self, name, value):
        setattr(self, name, value.double() if value.is_floating_point() else value)


class EvalUsesTheBatch(Plain):
    def eval_moments(self, x):
        return self.moments(x)


class MomentumIsInverted(Plain):
    def update_running_stats(self, x, mean, var):
        m = x.numel() // x.size(1)
        self.running_mean.lerp_(mean.detach().flatten(), 0.9)
        self.running_var.lerp_(var.detach().flatten() * m / (m - 1), 0.9)
        self.num_batches_tracked += 1


class VarianceWithoutGradient(Plain):
    def moments(self, x):
        mean, var = super().moments(x)
        return mean, var.detach()


class MeanOfMeans(Plain):
    sync_batchnorm = False

    def moments(self, x):
        mean, var = super().moments(x)
        if self.sync_batchnorm:
            for value in (mean.detach(), var.detach()):
                dist.all_reduce(value)
                value /= dist.get_world_size()
        return mean, var


class GraphIsKept(Plain):
    def update_running_stats(self, x, mean, var):
        self.running_mean = 0.9 * self.running_mean + 0.1 * mean.flatten()


class RunningVarianceIsBiased(Plain):
    def update_running_stats(self, x, mean, var):
        m = x.numel() // x.size(1)
        super().update_running_stats(x, mean, var * (m - 1) / m)


class RMSNorm(nn.Module):
    def __init__(self, num_features, num_dims):
        super().__init__()

    def forward(self, x):
        return x * (x.square().mean(1, keepdim=True) + 1e-5).rsqrt()
