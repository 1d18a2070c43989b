"""Bugs of gamma and beta, of axes and memory layouts, and of numerics and dtypes."""

import torch

from tests.support.planted_bases import (
    BatchNorm,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    RMSNorm,
    at_least_float32,
    batch_axes,
    moments,
    per_channel,
)


class GammaIgnoredInEval(BatchNorm):
    # Evaluation does not multiply by gamma.
    def affine(self, x_hat):
        return super().affine(x_hat) if self.training else x_hat + per_channel(self.bias, x_hat)


class BetaBeforeGamma(BatchNorm):
    # beta is added before the multiplication by gamma.
    def affine(self, x_hat):
        return (x_hat + per_channel(self.bias, x_hat)) * per_channel(self.weight, x_hat)


class GammaTwice(LayerNorm):
    # gamma is applied twice.
    def affine(self, x_hat):
        return super().affine(x_hat * per_channel(self.weight, x_hat))


class GammaAlongWidth(BatchNorm):
    # gamma and beta broadcast along the last dim: this works for (N, C), and if W is C.
    def affine(self, x_hat):
        return x_hat * self.weight + self.bias


class GammaWithoutGradient(BatchNorm):
    # gamma has no gradient, because .data is used.
    def affine(self, x_hat):
        return x_hat * per_channel(self.weight.data, x_hat) + per_channel(self.bias, x_hat)


class GammaNotParameter(BatchNorm):
    # gamma is a tensor that no optimizer sees.
    def __init__(self, num_features, num_dims, eps=1e-5, momentum=0.1):
        super().__init__(num_features, num_dims, eps, momentum)
        gamma = self.weight.detach()
        del self.weight
        self.weight = gamma


class BatchAxisOnly(BatchNorm):
    # The moments are those of each position over the batch.
    def batch_moments(self, x):
        return moments(x, [0])

    def move(self, name, new):
        super().move(name, new.mean(batch_axes(new)))


class WidthMissing(BatchAxisOnly):
    # The moments are those of each column: the last dim is missing in the axes.
    def batch_moments(self, x):
        return moments(x, batch_axes(x)[:2])


class ChannelsLastDim(BatchNorm):
    # The channels are taken from the last dim, as in (N, H, W, C).
    def forward(self, x):
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


class FailsFor3Dims(BatchNorm):
    # The check of dims knows (N, C) and images only.
    def forward(self, x):
        assert x.dim() in (2, 4, 5), "expected 2, 4 or 5 dims"
        return super().forward(x)


class FailsFor5Dims(BatchNorm):
    # gamma and beta are reshaped to 4 dims for every feature map.
    def affine(self, x_hat):
        if x_hat.dim() < 4:
            return super().affine(x_hat)
        return x_hat * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class SamplesMixed(LayerNorm):
    # A layer norm over the whole batch: each result depends on the other samples.
    def normalize(self, x):
        return self.standardize(x, *moments(x, list(range(x.dim()))))


class BatchSizeOfFirstCall(InstanceNorm):
    # The number of samples of the first call is kept for the reshape.
    samples = None

    def normalize(self, x):
        self.samples = self.samples or len(x)
        flat = x.reshape(self.samples * self.num_features, -1)
        return self.standardize(flat, *moments(flat, [1])).reshape(x.shape)


class SqueezedBatchOfOne(InstanceNorm):
    # squeeze() removes the batch dim of a batch of one.
    def normalize(self, x):
        return super().normalize(x).squeeze()


class RunningForBatchOfOne(BatchNorm):
    # A batch of one is normalized with running statistics in training, also for large images.
    def normalize(self, x):
        if len(x) == 1:
            return self.standardize(x, *self.running_moments(x))
        return super().normalize(x)


class NanForOneValue(BatchNorm):
    # One value per channel makes the running variance NaN: torch.var divides by m - 1.
    def training_moments(self, x):
        mean, var = self.batch_moments(x)
        self.count()
        self.move("running_mean", mean)
        self.move("running_var", x.var(batch_axes(x)))
        return mean, var


class SquaresMinusSquare(BatchNorm):
    # The variance is E[x^2] - E[x]^2, which cancels for a large mean.
    def batch_moments(self, x):
        mean = x.mean(batch_axes(x), keepdim=True)
        return mean, x.square().mean(batch_axes(x), keepdim=True) - mean.square()


class Float16Sums(BatchNorm):
    # A float16 input is summed in float16 and overflows.
    def forward(self, x):
        return self.affine(self.normalize(x)).to(x.dtype)

    def batch_moments(self, x):
        m = x.numel() // x.size(1)
        mean = x.sum(batch_axes(x), keepdim=True) / m
        return mean, (x - mean).square().sum(batch_axes(x), keepdim=True) / m


class Bfloat16Statistics(BatchNorm):
    # The moments of a float32 input are rounded to bfloat16.
    def batch_moments(self, x):
        mean, var = super().batch_moments(x)
        return mean.bfloat16().to(x.dtype), var.bfloat16().to(x.dtype)


class EpsOutsideRoot(BatchNorm):
    # eps is added to the standard deviation.
    def standardize(self, x, mean, var):
        return (x - mean) / ((var + 1e-12).sqrt() + self.eps)


class EpsTwice(LayerNorm):
    # eps is added to the variance twice.
    def standardize(self, x, mean, var):
        return super().standardize(x, mean, var + self.eps)


class EpsOnlyInTraining(BatchNorm):
    # Evaluation does not add eps.
    def running_moments(self, x):
        mean, var = super().running_moments(x)
        return mean, var - self.eps


class EpsIgnored(BatchNorm):
    # The argument eps has no effect: 1e-5 is written into the code.
    def __init__(self, num_features, num_dims, eps=1e-3, momentum=0.1):
        super().__init__(num_features, num_dims, eps, momentum)

    def standardize(self, x, mean, var):
        return (x - mean) / (var + 1e-5).sqrt()


class TutorialLayerNorm(LayerNorm):
    # torch.std is unbiased by default, and eps is added to it, as in "The Annotated Transformer".
    def normalize(self, x):
        axes = list(range(1, x.dim()))
        return (x - x.mean(axes, keepdim=True)) / (x.std(axes, keepdim=True) + self.eps)


class NanGradientOfStd(LayerNorm):
    # The gradient of the root of a zero variance is NaN: eps is added after the root.
    def standardize(self, x, mean, var):
        return (x - mean) / (var.sqrt() + self.eps)


class NoEps(BatchNorm):
    # A constant channel is divided by zero.
    def standardize(self, x, mean, var):
        return (x - mean) / var.sqrt()


class EpsUnderflows(RMSNorm):
    # eps 1e-8 is added in float16, where it is 0: a zero sample gives NaN.
    def __init__(self, num_features, num_dims, eps=1e-8):
        super().__init__(num_features, num_dims, eps)

    def forward(self, x):
        mean_square = x.square().mean(1, keepdim=True)
        eps = torch.tensor(self.eps, dtype=x.dtype)
        return self.affine(x / (mean_square + eps).sqrt()).to(x.dtype)


class SumForMean(RMSNorm):
    # The sum of squares is used in place of their mean: the square root of C is missing.
    def normalize(self, x):
        return x / (x.square().sum(1, keepdim=True) + self.eps).sqrt()


class AutocastMean(BatchNorm):
    # The mean is a matrix product, which autocast computes in bfloat16.
    def batch_moments(self, x):
        flat = x.movedim(1, 0).flatten(1)
        mean = (flat @ flat.new_ones(flat.size(1), 1)).to(x.dtype) / flat.size(1)
        mean = per_channel(mean, x)
        return mean, (x - mean).square().mean(batch_axes(x), keepdim=True)


class InputModified(BatchNorm):
    # The input is centred in place when no gradient is needed.
    def standardize(self, x, mean, var):
        if torch.is_grad_enabled():
            return super().standardize(x, mean, var)
        return x.sub_(mean).div_((var + self.eps).sqrt())


class MemoryOrder(GroupNorm):
    # The values are read in memory order: wrong for channels_last.
    def normalize(self, x):
        if not x.is_contiguous() and x.dim() > 2:
            strides = torch.empty(x.shape, device="meta").stride()
            x = x.as_strided(x.shape, strides)
        return super().normalize(x)


class OffsetIgnored(LayerNorm):
    # The values are read from the beginning of the storage: wrong for a slice such as x[1:].
    def forward(self, x):
        return super().forward(x.as_strided(x.shape, x.stride(), 0))


class ViewOfInput(GroupNorm):
    # view() raises an error for an input that is not contiguous.
    def normalize(self, x):
        return super().normalize(x.view(-1).view(x.shape))


class StridesOfInput(LayerNorm):
    # The result gets the strides of the input, which fails for an expanded input.
    def forward(self, x):
        result = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        return result.copy_(super().forward(x))


class ReturnsFloat32(LayerNorm):
    # The result of a bfloat16 layer and input is float32.
    def forward(self, x):
        return self.affine(self.normalize(at_least_float32(x)))


class Float64BecomesFloat32(BatchNorm):
    # The result of a float64 layer and input is float32.
    def forward(self, x):
        result = super().forward(x)
        return result.float() if x.dtype == torch.float64 else result


class MadeOnCpu(LayerNorm):
    # A constant is made on the CPU, wherever the input is.
    def affine(self, x_hat):
        return super().affine(x_hat) + per_channel(torch.zeros(self.num_features), x_hat)
