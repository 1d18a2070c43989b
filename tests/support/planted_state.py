"""Bugs of the mode, of the running statistics, and of copying, saving and loading."""

import torch
from torch import nn

from tests.support.planted_bases import BatchNorm, LayerNorm, per_channel


class GradModeForTraining(BatchNorm):
    # The mode is torch.is_grad_enabled(), as in "Dive into Deep Learning".
    def normalize(self, x):
        training = torch.is_grad_enabled()
        moments = self.training_moments(x) if training else self.running_moments(x)
        return self.standardize(x, *moments)


class EvalUsesBatch(BatchNorm):
    # Evaluation normalizes with the batch.
    def running_moments(self, x):
        return self.batch_moments(x)


class TrainingUsesRunning(BatchNorm):
    # Training normalizes with the running statistics.
    def training_moments(self, x):
        super().training_moments(x)
        mean, var = self.running_moments(x)
        return mean.clone(), var.clone()


class ModeOfConstruction(BatchNorm):
    # The mode is copied when the layer is built.
    def __init__(self, num_features, num_dims):
        super().__init__(num_features, num_dims)
        self.is_training = self.training

    def normalize(self, x):
        moments = self.training_moments(x) if self.is_training else self.running_moments(x)
        return self.standardize(x, *moments)


class EvalUsesLastBatch(BatchNorm):
    # Evaluation uses the moments of the last training batch.
    def update(self, mean, var, m):
        super().update(mean, var, m)
        self.last = mean.detach(), var.detach()

    def running_moments(self, x):
        return getattr(self, "last", super().running_moments(x))


class TrainReturnsNone(BatchNorm):
    # train() does not return the layer, so that layer.eval()(x) fails.
    def train(self, mode=True):
        super().train(mode)


class EvalResetsStatistics(BatchNorm):
    # eval() resets the running statistics.
    def train(self, mode=True):
        if not mode:
            self.reset_running_stats()
        return super().train(mode)


class TrainIsIgnored(BatchNorm):
    # train() leaves the layer in evaluation mode, as in code that freezes a backbone.
    def train(self, mode=True):
        return super().train(False)


class BiasedRunningVar(BatchNorm):
    # The running variance lacks Bessel's correction m / (m - 1).
    def update(self, mean, var, m):
        self.move("running_mean", mean)
        self.move("running_var", var)


class UnbiasedNormalization(BatchNorm):
    # Training divides by the unbiased standard deviation, the default of torch.var.
    def batch_moments(self, x):
        mean, var = super().batch_moments(x)
        m = x.numel() // x.size(1)
        return mean, var * m / (m - 1)

    def update(self, mean, var, m):
        self.move("running_mean", mean)
        self.move("running_var", var)


class InvertedMomentum(BatchNorm):
    # The momentum 0.1 is the weight of the old value.
    def factor(self):
        return 1 - self.momentum


class IgnoredMomentum(BatchNorm):
    # The momentum is always 0.1, whatever the argument is.
    def __init__(self, num_features, num_dims, eps=1e-5, momentum=0.01):
        super().__init__(num_features, num_dims, eps, momentum)

    def factor(self):
        return 0.1


class NeverUpdated(BatchNorm):
    # Training does not update the running statistics.
    def update(self, mean, var, m):
        pass


class VarNotUpdated(BatchNorm):
    # Training updates the running mean only.
    def update(self, mean, var, m):
        self.move("running_mean", mean)


class UpdatedInEval(BatchNorm):
    # Evaluation updates the running statistics.
    def running_moments(self, x):
        m = x.numel() // x.size(1)
        self.update(*self.batch_moments(x), m + (m == 1))
        return super().running_moments(x)


class UpdatedTwice(BatchNorm):
    # Each batch updates the running statistics twice.
    def update(self, mean, var, m):
        super().update(mean, var, m)
        super().update(mean, var, m)


class SharedByClass(BatchNorm):
    # All layers with as many channels share their running statistics: a class attribute.
    shared = {}

    def register_statistics(self, num_features):
        super().register_statistics(num_features)
        mean_and_var = self.shared.setdefault(num_features, (self.running_mean, self.running_var))
        self.running_mean, self.running_var = mean_and_var


class CountOfFirstBatch(BatchNorm):
    # Bessel's correction uses the number of values of the first batch for all batches.
    m = None

    def update(self, mean, var, m):
        self.m = self.m or m
        super().update(mean, var, self.m)


class SamplesForValues(BatchNorm):
    # Bessel's correction counts the samples, not the values per channel.
    def training_moments(self, x):
        self.samples = len(x)
        return super().training_moments(x)

    def update(self, mean, var, m):
        super().update(mean, var, max(self.samples, 2))


class NeverCounts(BatchNorm):
    # num_batches_tracked stays 0.
    def count(self):
        pass


class CountsInEval(BatchNorm):
    # num_batches_tracked counts evaluation batches, too.
    def forward(self, x):
        self.num_batches_tracked += not self.training
        return super().forward(x)


class GraphKept(BatchNorm):
    # The running statistics keep the graph of all batches before: detach is missing.
    def move(self, name, new):
        old = getattr(self, name)
        setattr(self, name, old + self.factor() * (new.flatten() - old))


class NotBuffers(BatchNorm):
    # The running statistics are plain attributes: neither saved nor moved to another device.
    def register_buffer(self, name, value, persistent=True):
        setattr(self, name, value)


class NotSaved(BatchNorm):
    # The running statistics are buffers that are not persistent.
    def register_buffer(self, name, value, persistent=True):
        super().register_buffer(name, value, persistent=False)


class StatisticsAreParameters(BatchNorm):
    # The running statistics are parameters that an optimizer would change.
    def register_statistics(self, num_features):
        super().register_statistics(num_features)
        del self.running_mean, self.running_var
        self.running_mean = nn.Parameter(torch.zeros(num_features))
        self.running_var = nn.Parameter(torch.ones(num_features))

    def move(self, name, new):
        with torch.no_grad():
            super().move(name, new)


class WrongCumulativeAverage(BatchNorm):
    # With momentum None, the initial value counts as a batch.
    def __init__(self, num_features, num_dims, eps=1e-5, momentum=None):
        super().__init__(num_features, num_dims, eps, momentum)

    def factor(self):
        return 1 / (self.num_batches_tracked + 1)


class ResetForgetsCount(BatchNorm):
    # reset_running_stats() does not reset num_batches_tracked.
    def reset_running_stats(self):
        self.running_mean.zero_()
        self.running_var.fill_(1)


class ResetForgetsVar(BatchNorm):
    # reset_running_stats() does not reset the running variance.
    def reset_running_stats(self):
        self.running_mean.zero_()
        self.num_batches_tracked.zero_()


class NoUpdateUnderNoGrad(BatchNorm):
    # A training pass under no_grad does not update, as when statistics are recalibrated.
    def update(self, mean, var, m):
        if torch.is_grad_enabled():
            super().update(mean, var, m)


class UpdateUnderNoGradOnly(BatchNorm):
    # Only a training pass under no_grad updates.
    def update(self, mean, var, m):
        if not torch.is_grad_enabled():
            super().update(mean, var, m)


class StdAsRunningVar(BatchNorm):
    # The running variance is an average of standard deviations, but evaluation takes its root.
    def update(self, mean, var, m):
        super().update(mean, var.sqrt(), m)


class FirstBatchByPythonCounter(BatchNorm):
    # A Python counter says which batch is the first; a loaded layer starts again.
    steps = 0

    def factor(self):
        return 1 if self.steps == 1 else self.momentum

    def count(self):
        super().count()
        self.steps += 1


class LambdaAttribute(LayerNorm):
    # The layer cannot be pickled: an attribute is a lambda.
    def __init__(self, num_features, num_dims, eps=1e-5):
        super().__init__(num_features, num_dims, eps)
        self.activation = lambda x: x

    def forward(self, x):
        return self.activation(super().forward(x))


class ClosureOverTensor(LayerNorm):
    # A function refers to gamma of the original, also in a deep copy of the layer.
    def __init__(self, num_features, num_dims, eps=1e-5):
        super().__init__(num_features, num_dims, eps)
        weight = self.weight
        self.scale = lambda x_hat: x_hat * per_channel(weight, x_hat)

    def affine(self, x_hat):
        return self.scale(x_hat) + per_channel(self.bias, x_hat)


class DerivedTensorAttribute(LayerNorm):
    # exp(weight) is computed once: it does not follow the weight, and deepcopy fails.
    def __init__(self, num_features, num_dims, eps=1e-5):
        super().__init__(num_features, num_dims, eps)
        self.weight.data.zero_()
        self.gamma = self.weight.exp()

    def affine(self, x_hat):
        return x_hat * per_channel(self.gamma, x_hat) + per_channel(self.bias, x_hat)


class LoadDropsKeys(BatchNorm):
    # Loading ignores the running statistics without a message.
    def _load_from_state_dict(self, state_dict, prefix, *args):
        kept = {key: value for key, value in state_dict.items() if "running" not in key}
        own = {f"{prefix}{name}": getattr(self, name) for name in ("running_mean", "running_var")}
        super()._load_from_state_dict({**kept, **own}, prefix, *args)


class LoadCastsToFloat32(BatchNorm):
    # A float64 layer has float32 running statistics after load_state_dict.
    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self.running_mean = self.running_mean.float()
        self.running_var = self.running_var.float()


class SavedWithoutStatistics(BatchNorm):
    # state_dict() leaves the running variance out.
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}running_var"]


class LazyGamma(BatchNorm):
    # gamma appears in the first call, after the optimizer has been built.
    def __init__(self, num_features, num_dims, eps=1e-5, momentum=0.1):
        super().__init__(num_features, num_dims, eps, momentum)
        del self.weight

    def affine(self, x_hat):
        if not hasattr(self, "weight"):
            self.weight = nn.Parameter(x_hat.new_ones(self.num_features))
        return super().affine(x_hat)


class CachedInEval(BatchNorm):
    # gamma / sqrt(var + eps) is cached in evaluation, and stays after more training.
    cache = None

    def normalize(self, x):
        if self.training:
            return super().normalize(x)
        if self.cache is None:
            self.cache = tuple(moment.clone() for moment in self.running_moments(x))
        return self.standardize(x, *self.cache)


class GlobalEps(BatchNorm):
    # eps is a class attribute: the layer that was built last decides for all.
    def __init__(self, num_features, num_dims, eps=1e-5, momentum=0.1):
        super().__init__(num_features, num_dims, eps, momentum)
        GlobalEps.last_eps = eps

    def standardize(self, x, mean, var):
        return (x - mean) / (var + GlobalEps.last_eps).sqrt()


class StatisticsById(BatchNorm):
    # The running statistics are in a dict by id(self), which a copy does not find.
    by_id = {}

    def register_statistics(self, num_features):
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def statistics(self):
        zeros = torch.zeros(self.num_features)
        return self.by_id.setdefault(id(self), {"running_mean": zeros, "running_var": zeros + 1})

    def running_moments(self, x):
        return tuple(per_channel(value, x) for value in self.statistics().values())

    def move(self, name, new):
        old = self.statistics()[name]
        old += self.factor() * (new.detach().flatten() - old)


class NotConverted(BatchNorm):
    # double() and half() leave the running statistics as they are, and evaluation refuses.
    def _apply(self, fn, recurse=True):
        for parameter in self.parameters():
            parameter.data = fn(parameter.data)
        return self

    def running_moments(self, x):
        if self.weight.dtype != self.running_mean.dtype:
            raise TypeError("expected the same dtype")
        return super().running_moments(x)
