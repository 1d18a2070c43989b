"""Bugs of the derivatives, of several processes, and of compiled code."""

import torch
from torch.autograd.function import once_differentiable

from tests.support.planted_bases import (
    BatchNorm,
    HandWritten,
    LayerNorm,
    Normalize,
    SyncBatchNorm,
    batch_axes,
    derivatives,
)


class DetachedMean(BatchNorm):
    # The derivative treats the mean as a constant: detach.
    def standardize(self, x, mean, var):
        return super().standardize(x, mean.detach(), var)


class DetachedVar(LayerNorm):
    # The derivative treats the variance as a constant: detach.
    def standardize(self, x, mean, var):
        return super().standardize(x, mean, var.detach())


class NoGradInEval(BatchNorm):
    # Evaluation runs under no_grad, so that the input has no gradient.
    def forward(self, x):
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            return super().forward(x)


class BackwardWithoutGamma(HandWritten):
    # The hand-written derivative for the input does not multiply by gamma.
    class function(Normalize):
        @staticmethod
        @once_differentiable
        def backward(ctx, grad):
            x_hat, gamma, inv_std = ctx.saved_tensors
            ones = torch.ones_like(gamma)
            return *derivatives(grad, x_hat, ones, inv_std, ctx.training), None, None, None


class BackwardWithoutMeanTerm(HandWritten):
    # The hand-written derivative lacks the mean of the incoming gradient.
    class function(Normalize):
        @staticmethod
        @once_differentiable
        def backward(ctx, grad):
            _, gamma, inv_std = ctx.saved_tensors
            grad_x, *others = derivatives(grad, *ctx.saved_tensors, ctx.training)
            if ctx.training:
                grad_x = grad_x + (grad * gamma).mean(batch_axes(grad), keepdim=True) * inv_std
            return grad_x, *others, None, None, None


class BackwardOfTrainingInEval(HandWritten):
    # The hand-written derivative is that of training in evaluation, too.
    class function(Normalize):
        @staticmethod
        @once_differentiable
        def backward(ctx, grad):
            return *derivatives(grad, *ctx.saved_tensors, True), None, None, None


class BackwardInMemoryOrder(HandWritten):
    # The incoming gradient is read in memory order: wrong if it is not contiguous.
    class function(Normalize):
        @staticmethod
        @once_differentiable
        def backward(ctx, grad):
            if 0 not in grad.stride():
                strides = torch.empty(grad.shape, device="meta").stride()
                grad = grad.as_strided(grad.shape, strides)
            return *derivatives(grad, *ctx.saved_tensors, ctx.training), None, None, None


class BackwardViewsGradient(HandWritten):
    # view() of the incoming gradient raises an error if it is not contiguous.
    class function(Normalize):
        @staticmethod
        @once_differentiable
        def backward(ctx, grad):
            grad = grad.view(-1).view(grad.shape)
            return *derivatives(grad, *ctx.saved_tensors, ctx.training), None, None, None


class BackwardModifiesGradient(HandWritten):
    # The backward pass multiplies the incoming gradient in place.
    class function(Normalize):
        @staticmethod
        @once_differentiable
        def backward(ctx, grad):
            x_hat, gamma, inv_std = ctx.saved_tensors
            _, *others = derivatives(grad, *ctx.saved_tensors, ctx.training)
            if 0 not in grad.stride():
                grad.mul_(gamma)
            else:
                grad = grad * gamma
            ones = torch.ones_like(gamma)
            grad_x, *_ = derivatives(grad, x_hat, ones, inv_std, ctx.training)
            return grad_x, *others, None, None, None


class SecondDerivativeOfConstants(HandWritten):
    # The second derivative is wrong without an error: x_hat and inv_std are kept as constants.
    class function(Normalize):
        @staticmethod
        def backward(ctx, grad):
            x_hat, gamma, inv_std = ctx.saved_tensors
            saved = x_hat.detach(), gamma, inv_std.detach()
            return *derivatives(grad, *saved, ctx.training), None, None, None


class UnsavedOutput(HandWritten):
    # The output is kept outside of save_for_backward: an in-place op behind changes it unseen.
    class function(Normalize):
        @staticmethod
        def forward(ctx, x, gamma, beta, mean, inv_std, training):
            y = Normalize.forward(ctx, x, gamma, beta, mean, inv_std, training)
            ctx.save_for_backward(gamma, beta, inv_std)
            ctx.y = y
            return y

        @staticmethod
        @once_differentiable
        def backward(ctx, grad):
            gamma, beta, inv_std = ctx.saved_tensors
            x_hat = (ctx.y.detach() - beta) / gamma
            return *derivatives(grad, x_hat, gamma, inv_std, ctx.training), None, None, None


class SavedOutput(HandWritten):
    # The output is saved for the backward pass: an in-place op behind raises an error.
    class function(Normalize):
        @staticmethod
        def forward(ctx, x, gamma, beta, mean, inv_std, training):
            y = Normalize.forward(ctx, x, gamma, beta, mean, inv_std, training)
            ctx.save_for_backward(gamma, beta, inv_std, y)
            return y

        @staticmethod
        @once_differentiable
        def backward(ctx, grad):
            gamma, beta, inv_std, y = ctx.saved_tensors
            x_hat = (y - beta) / gamma
            return *derivatives(grad, x_hat, gamma, inv_std, ctx.training), None, None, None


class OutputIsView(HandWritten):
    # The function returns a view, and an in-place op behind raises an error.
    class function(Normalize):
        @staticmethod
        def forward(ctx, *arguments):
            return Normalize.forward(ctx, *arguments).flatten().view(arguments[0].shape)


class GammaGradientIsMean(HandWritten):
    # The derivative for gamma is averaged over the batch, not summed.
    class function(Normalize):
        @staticmethod
        @once_differentiable
        def backward(ctx, grad):
            x, gamma, beta = derivatives(grad, *ctx.saved_tensors, ctx.training)
            return x, gamma / len(grad), beta, None, None, None


class FrozenGammaStopsGradient(HandWritten):
    # If gamma is frozen, the input gets no gradient.
    class function(Normalize):
        @staticmethod
        @once_differentiable
        def backward(ctx, grad):
            if not ctx.needs_input_grad[1]:
                return None, None, None, None, None, None
            return *derivatives(grad, *ctx.saved_tensors, ctx.training), None, None, None


class MeanOfMeans(SyncBatchNorm):
    # The moments are averaged over the processes, as if all shards had the same size.
    def global_moments(self, x, count):
        processes = torch.distributed.get_world_size()
        mean = self.total(x.mean(batch_axes(x), keepdim=True)) / processes
        square = (x - mean).square().mean(batch_axes(x), keepdim=True)
        return mean, self.total(square) / processes


class VarNotSynchronized(SyncBatchNorm):
    # The mean is synchronized, and the variance is that of the own shard.
    def global_moments(self, x, count):
        mean = self.total(x.sum(batch_axes(x), keepdim=True)) / count
        return mean, self.batch_moments(x)[1]


class GradientNotSynchronized(SyncBatchNorm):
    # The sums are synchronized by all_reduce, through which no gradient of others flows.
    def total(self, values):
        return values + (super().total(values.detach()) - values.detach())


class LocalRunningStatistics(SyncBatchNorm):
    # The running statistics are those of the own shard.
    local = None

    def global_moments(self, x, count):
        self.local = self.batch_moments(x.detach())
        return super().global_moments(x, count)

    def update(self, mean, var, m):
        super().update(*(self.local or (mean, var)), m)


class EmptyShardWaits(SyncBatchNorm):
    # A process with an empty shard takes part in no collective: the others wait (deadlock).
    def forward(self, x):
        return super().forward(x) if len(x) else x


class PythonCounter(BatchNorm):
    # torch.compile bakes a Python counter into the graph and compiles again for each batch.
    steps = 0

    def factor(self):
        return max(self.momentum, 1 / self.steps)

    def count(self):
        super().count()
        self.steps += 1


class BranchOnValues(BatchNorm):
    # An if on the values of a tensor breaks the graph of torch.compile.
    def standardize(self, x, mean, var):
        if var.min() < 1e-12:
            var = var.clamp(min=1e-12)
        return super().standardize(x, mean, var)
