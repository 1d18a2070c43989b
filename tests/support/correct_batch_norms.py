"""Correct batch normalizations whose code or state differs from PyTorch's in one respect.

`BATCH_NORMS` names those that behave as PyTorch's layer, whatever their state is called.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from tests.support import library_norms
from tests.support.planted_bases import (
    Affine,
    BatchNorm,
    HandWritten,
    SyncBatchNorm,
    at_least_float32,
    batch_axes,
    moments,
    per_channel,
)


class Decay(BatchNorm):
    """The constant is the weight of the old value, as in TensorFlow and in many articles."""

    def __init__(self, num_features, num_dims, eps=1e-5, decay=0.9):
        super().__init__(num_features, num_dims, eps)
        del self.momentum
        self.decay = decay

    def factor(self):
        return 1 - self.decay


class OtherNames(nn.Module):
    def __init__(self, num_features, num_dims, eps=1e-5, alpha=0.1):
        super().__init__()
        self.eps, self.alpha = eps, alpha
        shape = (1, num_features, *[1] * (num_dims - 2))
        self.scale = nn.Parameter(torch.ones(shape))
        self.shift = nn.Parameter(torch.zeros(shape))
        self.register_buffer("mu", torch.zeros(shape))
        self.register_buffer("sigma2", torch.ones(shape))
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x):
        wide = at_least_float32(x)
        mu, sigma2 = self.mu, self.sigma2
        if self.training:
            m = x.numel() // x.size(1)
            if m < 2:
                raise ValueError("Training needs more than 1 value per channel.")
            mu, sigma2 = moments(wide, batch_axes(x))
            with torch.no_grad():
                self.steps += 1
                self.mu += self.alpha * (mu - self.mu)
                self.sigma2 += self.alpha * (sigma2 * m / (m - 1) - self.sigma2)
        x_hat = (wide - mu) * torch.rsqrt(sigma2 + self.eps)
        return (self.scale * x_hat + self.shift).to(x.dtype)


class Epsilon(BatchNorm):
    def __init__(self, num_features, num_dims, epsilon=1e-5, momentum=0.1):
        super().__init__(num_features, num_dims, epsilon, momentum)
        del self.eps
        self.epsilon = epsilon

    def standardize(self, x, mean, var):
        return (x - mean) * (var + self.epsilon).rsqrt()


class StdOfRunningVar(BatchNorm):
    """The state is the square root of the running variance."""

    def register_statistics(self, num_features):
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_std", torch.ones(num_features))

    def reset_running_stats(self):
        self.running_mean.zero_()
        self.running_std.fill_(1)

    def count(self):
        pass

    def running_moments(self, x):
        return per_channel(self.running_mean, x), per_channel(self.running_std.square(), x)

    def update(self, mean, var, m):
        self.move("running_mean", mean)
        running_var = self.running_std.square()
        running_var += self.factor() * ((var * m / (m - 1)).detach().flatten() - running_var)
        self.running_std.copy_(running_var.sqrt())


class AverageOfStds(StdOfRunningVar):
    """The state is a moving average of standard deviations (Ioffe 2017, algorithm 1)."""

    def update(self, mean, var, m):
        self.move("running_mean", mean)
        self.move("running_std", (var * m / (m - 1)).sqrt())


class BetaBeforeGamma(BatchNorm):
    def __init__(self, num_features, num_dims, eps=1e-5, momentum=0.1):
        super().__init__(num_features, num_dims, eps, momentum)
        gamma = self.weight
        del self.weight
        self.weight = gamma


class UnusedParameter(BatchNorm):
    def __init__(self, num_features, num_dims, eps=1e-5, momentum=0.1):
        super().__init__(num_features, num_dims, eps, momentum)
        self.unused = nn.Parameter(torch.zeros(num_features))


class FrozenGamma(BatchNorm):
    def __init__(self, num_features, num_dims, eps=1e-5, momentum=0.1):
        super().__init__(num_features, num_dims, eps, momentum)
        self.weight.requires_grad_(False)


class ZeroCentredGamma(BatchNorm):
    """gamma is 1 + weight, so that weight decay pulls gamma to 1 (as in Gemma's RMSNorm)."""

    def __init__(self, num_features, num_dims, eps=1e-5, momentum=0.1):
        super().__init__(num_features, num_dims, eps, momentum)
        nn.init.zeros_(self.weight)

    def affine(self, x_hat):
        return per_channel(1 + self.weight, x_hat) * x_hat + per_channel(self.bias, x_hat)


class ScalarGamma(BatchNorm):
    """One gamma for all channels."""

    def __init__(self, num_features, num_dims, eps=1e-5, momentum=0.1):
        super().__init__(num_features, num_dims, eps, momentum)
        self.weight = nn.Parameter(torch.tensor(1.0))


class BroadcastGamma(BatchNorm):
    """gamma and beta have the shape (1, C, 1, ...)."""

    def __init__(self, num_features, num_dims, eps=1e-5, momentum=0.1):
        super().__init__(num_features, num_dims, eps, momentum)
        shape = (1, num_features, *[1] * (num_dims - 2))
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))


class WithoutAffine(BatchNorm):
    def __init__(self, num_features, num_dims, eps=1e-5, momentum=0.1):
        super().__init__(num_features, num_dims, eps, momentum)
        del self.weight, self.bias

    def affine(self, x_hat):
        return x_hat


class WithoutRunningStatistics(BatchNorm):
    """Both modes use the batch."""

    def register_statistics(self, num_features):
        pass

    def count(self):
        pass

    def update(self, mean, var, m):
        pass

    def running_moments(self, x):
        return self.batch_moments(x)


class Float32Statistics(BatchNorm):
    """The running statistics stay float32 when the layer is converted, for example by half()."""

    def _apply(self, fn, recurse=True):
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        return self


class Float32Computation(BatchNorm):
    """Every input is normalized in float32, a float64 one too."""

    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


class ClampInsteadOfEps(BatchNorm):
    """The variance is at least eps.

    This is correct: a constant channel gives beta and a finite derivative, and a channel whose
    variance is above eps is scaled to exactly unit variance. The derivative jumps at eps only.
    """

    def standardize(self, x, mean, var):
        return (x - mean) / var.clamp(min=self.eps).sqrt()


class OnlyImages(BatchNorm):
    def __init__(self, num_features, num_dims, eps=1e-5, momentum=0.1):
        if num_dims != 4:
            raise ValueError(f"num_dims must be 4, not {num_dims}.")
        super().__init__(num_features, num_dims, eps, momentum)


class RejectsBatchOfOne(BatchNorm):
    def training_moments(self, x):
        if len(x) == 1:
            raise ValueError("Training needs batches of at least 2 samples.")
        return super().training_moments(x)


class FunctionalBatchNorm(Affine):
    """PyTorch's function with buffers of its own and no counter."""

    def __init__(self, num_features, num_dims, eps=1e-5, momentum=0.1):
        super().__init__(num_features, num_dims, eps)
        self.momentum = momentum
        self.register_buffer("average", torch.zeros(num_features))
        self.register_buffer("variance", torch.ones(num_features))

    def forward(self, x):
        state = (self.average, self.variance, self.weight, self.bias)
        return F.batch_norm(x, *state, self.training, self.momentum, self.eps)


LAYERS = {
    "batch_norm": BatchNorm,
    "momentum_0.001": partial(BatchNorm, momentum=0.001),
    "momentum_0.01": partial(BatchNorm, momentum=0.01),
    "momentum_0.3": partial(BatchNorm, momentum=0.3),
    "momentum_0.5": partial(BatchNorm, momentum=0.5),
    "cumulative_average": partial(BatchNorm, momentum=None),
    "decay": Decay,
    "other_names": OtherNames,
    "epsilon": Epsilon,
    "std_of_running_var": StdOfRunningVar,
    "average_of_stds": AverageOfStds,
    "beta_before_gamma": BetaBeforeGamma,
    "unused_parameter": UnusedParameter,
    "frozen_gamma": FrozenGamma,
    "zero_centred_gamma": ZeroCentredGamma,
    "scalar_gamma": ScalarGamma,
    "broadcast_gamma": BroadcastGamma,
    "without_affine": WithoutAffine,
    "without_running_statistics": WithoutRunningStatistics,
    "float32_statistics": Float32Statistics,
    "float32_computation": Float32Computation,
    "clamp_instead_of_eps": ClampInsteadOfEps,
    "only_images": OnlyImages,
    "rejects_batch_of_one": RejectsBatchOfOne,
    "once_differentiable": HandWritten,
    "functional": FunctionalBatchNorm,
    "synchronized": SyncBatchNorm,
}

# Each name has the arguments of PyTorch's layer with which its results are the same. These layers
# are left out because either answer is defensible: frozen_gamma (gamma has no gradient),
# zero_centred_gamma (the same function of 1 + weight), once_differentiable (no second
# derivative), rejects_batch_of_one (PyTorch accepts one image), and batch_renorm_with_warmup (the
# first 500 batches are the same; see tests.support.correct_norms).
BATCH_NORMS = {
    "batch_norm": {},
    "momentum_0.001": {"momentum": 0.001},
    "momentum_0.01": {"momentum": 0.01},
    "momentum_0.3": {"momentum": 0.3},
    "momentum_0.5": {"momentum": 0.5},
    "cumulative_average": {"momentum": None},
    "decay": {},
    "other_names": {},
    "epsilon": {},
    "std_of_running_var": {},
    "beta_before_gamma": {},
    "unused_parameter": {},
    "broadcast_gamma": {},
    "without_affine": {"affine": False},
    "without_running_statistics": {"track_running_stats": False},
    "float32_statistics": {},
    "float32_computation": {},
    "only_images": {},
    "functional": {},
    "synchronized": {},
    **library_norms.BATCH_NORMS,
}
