"""Batch normalization with its gradients written by hand: Ioffe and Szegedy 2015, section 3."""

import torch
from torch import nn


def moments(x, axes):
    m = max(x.numel() // x.size(1), 1)
    mean = x.sum(axes, keepdim=True) / m
    return mean, (x - mean).square().sum(axes, keepdim=True) / m


class Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, eps, axes, training):
        # The backward pass computes everything from the inputs, so it can be differentiated again.
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.axes, ctx.training = eps, axes, training
        return weight * (x - mean) / torch.sqrt(var + eps) + bias

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, var = ctx.saved_tensors
        if ctx.training:
            mean, var = moments(x, ctx.axes)
        std = torch.sqrt(var + ctx.eps)
        x_hat = (x - mean) / std
        grad_bias = grad.sum(ctx.axes, keepdim=True)
        grad_weight = (grad * x_hat).sum(ctx.axes, keepdim=True)
        grad_x = grad
        if ctx.training:
            m = max(x.numel() // x.size(1), 1)
            grad_x = grad - grad_bias / m - x_hat * grad_weight / m
        return weight * grad_x / std, grad_weight, grad_bias, None, None, None, None, None


class ManualBatchNorm(nn.Module):
    def __init__(self, num_features, num_dims, eps=1e-5, momentum=0.1):
        super().__init__()
        self.eps = eps
        self.momentum = momentum
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
        mean, var = self.running_mean.view(self.shape), self.running_var.view(self.shape)
        if self.training:
            with torch.no_grad():
                mean, var = moments(x, self.axes)
                self.update_running_stats(mean.flatten(), var.flatten(), x.numel() // x.size(1))
        weight, bias = self.weight.view(self.shape), self.bias.view(self.shape)
        y = Normalize.apply(x, weight, bias, mean, var, self.eps, self.axes, self.training)
        return y.to(dtype)

    def update_running_stats(self, mean, var, m):
        if m == 1:
            raise ValueError("In training, each channel must have more than one value.")
        self.num_batches_tracked += 1
        if m == 0:
            return
        factor = self.momentum
        if factor is None:
            factor = 1 / self.num_batches_tracked.item()
        unbiased_var = var * m / (m - 1)
        self.running_mean.copy_((1 - factor) * self.running_mean + factor * mean)
        self.running_var.copy_((1 - factor) * self.running_var + factor * unbiased_var)
