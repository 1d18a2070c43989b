"""Plain normalization layers, written out in PyTorch operations and correct.

They are bases: tests.support.planted_bugs overrides one method with a bug, and
tests.support.correct_norms overrides one method with another correct choice.
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable


def per_channel(values, x):
    """Reshape values of shape (C,) to (1, C, 1, ...), with as many dims as x (N, C, ...)."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


def batch_axes(x):
    """Return all dims of x except that of the channels."""
    return [0, *range(2, x.dim())]


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def moments(x, axes):
    """Return the mean and the biased variance of x; both keep their dims."""
    mean = x.mean(axes, keepdim=True)
    return mean, (x - mean).square().mean(axes, keepdim=True)


class Affine(nn.Module):
    """A normalization followed by gamma and beta; subclasses define `normalize`."""

    def __init__(self, num_features, num_dims, eps=1e-5):
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def standardize(self, x, mean, var):
        return (x - mean) / (var + self.eps).sqrt()

    def affine(self, x_hat):
        return x_hat * per_channel(self.weight, x_hat) + per_channel(self.bias, x_hat)

    def forward(self, x):
        return self.affine(self.normalize(at_least_float32(x))).to(x.dtype)


class BatchNorm(Affine):
    """Batch normalization (Ioffe and Szegedy 2015, algorithms 1 and 2)."""

    def __init__(self, num_features, num_dims, eps=1e-5, momentum=0.1):
        super().__init__(num_features, num_dims, eps)
        self.momentum = momentum
        self.register_statistics(num_features)

    def register_statistics(self, num_features):
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def reset_running_stats(self):
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def batch_moments(self, x):
        return moments(x, batch_axes(x))

    def running_moments(self, x):
        return per_channel(self.running_mean, x), per_channel(self.running_var, x)

    def count(self):
        self.num_batches_tracked += 1

    def factor(self):
        """Return the weight of the new batch. With momentum None, all batches weigh the same."""
        return 1 / self.num_batches_tracked if self.momentum is None else self.momentum

    def update(self, mean, var, m):
        """Update the running statistics; m is the number of values per channel."""
        self.move("running_mean", mean)
        self.move("running_var", var * m / (m - 1))

    def move(self, name, new):
        old = getattr(self, name)
        old += self.factor() * (new.detach().flatten() - old)

    def training_moments(self, x):
        m = x.numel() // x.size(1)
        if m == 1:
            raise ValueError(f"Training needs more than 1 value per channel: {tuple(x.shape)}.")
        mean, var = self.batch_moments(x)
        self.count()
        # An empty batch has no moments.
        if m:
            self.update(mean, var, m)
        return mean, var

    def normalize(self, x):
        get_moments = self.training_moments if self.training else self.running_moments
        return self.standardize(x, *get_moments(x))


class LayerNorm(Affine):
    """Layer normalization of all values of a sample (Ba, Kiros and Hinton 2016)."""

    def normalize(self, x):
        return self.standardize(x, *moments(x, list(range(1, x.dim()))))


class GroupNorm(Affine):
    """Group normalization (Wu and He 2018) with 2 groups, or 1 for an odd number of channels."""

    def normalize(self, x):
        groups = 2 - x.size(1) % 2
        grouped = x.reshape(x.size(0), groups, x.size(1) // groups, *x.shape[2:])
        return self.standardize(grouped, *moments(grouped, list(range(2, grouped.dim())))).reshape(
            x.shape
        )


class InstanceNorm(Affine):
    """Instance normalization without running statistics (Ulyanov et al. 2016)."""

    def __init__(self, num_features, num_dims, eps=1e-5):
        if num_dims == 2:
            raise ValueError("num_dims must be 3, 4 or 5: a channel of (N, C) has one value.")
        super().__init__(num_features, num_dims, eps)

    def normalize(self, x):
        return self.standardize(x, *moments(x, list(range(2, x.dim()))))


class RMSNorm(Affine):
    """Root mean square normalization over the channels (Zhang and Sennrich 2019), with a bias."""

    def normalize(self, x):
        return x / (x.square().mean(1, keepdim=True) + self.eps).sqrt()


def derivatives(grad, x_hat, gamma, inv_std, training):
    """Return the derivatives for x, gamma and beta (Ioffe and Szegedy 2015, section 3)."""
    axes = batch_axes(grad)
    grad_x = grad * gamma
    if training:
        along_x_hat = (grad_x * x_hat).mean(axes, keepdim=True)
        grad_x = grad_x - grad_x.mean(axes, keepdim=True) - x_hat * along_x_hat
    grad_gamma = (grad * x_hat).sum(axes, keepdim=True)
    return grad_x * inv_std, grad_gamma, grad.sum(axes, keepdim=True)


class Normalize(torch.autograd.Function):
    """gamma * (x - mean) * inv_std + beta; in training mode, mean and inv_std are those of x."""

    @staticmethod
    def forward(ctx, x, gamma, beta, mean, inv_std, training):
        x_hat = (x - mean) * inv_std
        ctx.save_for_backward(x_hat, gamma, inv_std)
        ctx.training = training
        return x_hat * gamma + beta

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *derivatives(grad, *ctx.saved_tensors, ctx.training), None, None, None


class HandWritten(BatchNorm):
    """Batch normalization with a hand-written first derivative; the second one raises."""

    function = Normalize

    def forward(self, x):
        wide = at_least_float32(x)
        get_moments = self.training_moments if self.training else self.running_moments
        mean, var = get_moments(wide.detach())
        gamma, beta = per_channel(self.weight, x), per_channel(self.bias, x)
        inv_std = (var + self.eps).rsqrt()
        return self.function.apply(wide, gamma, beta, mean, inv_std, self.training).to(x.dtype)


class SumOverProcesses(torch.autograd.Function):
    """The sum over all processes. Its derivative is summed over them, too."""

    @staticmethod
    def forward(ctx, values):
        total = values.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        return SumOverProcesses.apply(grad)


class SyncBatchNorm(BatchNorm):
    """Batch normalization with the statistics of the batches of all processes.

    Shards may have different sizes, and one may be empty.
    """

    total = staticmethod(SumOverProcesses.apply)

    def number_of_values(self, x):
        """Return the number of values per channel of all processes, as a tensor."""
        return self.total(x.new_full((1,), x.numel() // x.size(1)))

    def global_moments(self, x, count):
        axes = batch_axes(x)
        mean = self.total(x.sum(axes, keepdim=True)) / count
        return mean, self.total((x - mean).square().sum(axes, keepdim=True)) / count

    def training_moments(self, x):
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return super().training_moments(x)

        count = self.number_of_values(x)
        if count == 1:
            raise ValueError("Training needs more than 1 value per channel in all processes.")
        mean, var = self.global_moments(x, count)
        self.count()
        if count:
            self.update(mean, var, count)
        return mean, var
