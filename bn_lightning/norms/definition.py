"""Batch normalization by its definition, in plain operations that autograd differentiates.

Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
Internal Covariate Shift", 2015, https://arxiv.org/abs/1502.03167. Start reading here.
`fast.py` computes the same results in less time, and `layer.py` chooses between the
two.

Every function normalizes each channel separately:

    x_hat = (x - mean) / sqrt(var + eps)
    y = gamma * x_hat + beta

gamma and beta are learned. They are called `weight` and `bias`, as in PyTorch. In
training, mean and var are the statistics of the batch. In eval mode, they are running
statistics: averages over the batches of training. In eval mode, the result for one
sample therefore does not depend on the others.

Shapes: N is the number of samples in the batch, and C the number of channels. A batch
is (N, C) after a linear layer, and (N, C, H, W) after a 2-dimensional convolution.
"""

import math

from torch import Tensor


def normalize_batch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize each channel by the statistics of the batch: algorithm 1 of the paper.

    Args:
        x: (N, C) or (N, C, ...), float32 or float64.
        weight, bias: gamma and beta, (C,) each, or None.
        eps: added to the variance, which may be 0.

    Returns:
        y, with the shape of x, and two values for `update_running_stats`: the mean and
        the unbiased variance of each channel, (C,) each. The last two carry no
        gradient.
    """
    # Statistics are taken over all dimensions but the channels, that is over m values.
    all_but_channels = [d for d in range(x.dim()) if d != 1]
    m = values_per_channel(x)

    # An empty batch has m = 0. max(m, 1) makes its gradients 0 instead of NaN.
    mean = x.sum(all_but_channels) / max(m, 1)  # (C,)
    centered = x - per_channel(mean, x)  # (N, C, ...)
    squares = centered.square().sum(all_but_channels)  # (C,)
    var = squares / max(m, 1)  # (C,)

    y = centered * per_channel((var + eps).rsqrt(), x)  # (N, C, ...)
    if weight is not None:
        y = y * per_channel(weight, x)
    if bias is not None:
        y = y + per_channel(bias, x)

    # The mean of a batch is fitted to that batch, so `var` is too small on average.
    # Dividing by m - 1 corrects this. Only the running variance uses the corrected
    # value.
    unbiased_var = squares / max(m - 1, 1)  # (C,)
    return y, mean.detach(), unbiased_var.detach()


def update_running_stats(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    unbiased_var: Tensor,
    momentum: float | Tensor,
) -> None:
    """Move the running statistics towards those of a batch, in place: algorithm 2, step 10.

    The paper averages over batches after training. This is an exponential moving
    average, as in PyTorch. The four tensors are (C,). 16-bit running statistics are
    computed in float32, and rounded once.
    """
    for running, value in ((running_mean, mean), (running_var, unbiased_var)):
        wide = at_least_float32(running)
        running.copy_((1 - momentum) * wide + momentum * value)


def normalize_with_running_stats(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Normalize each channel of x, (N, C, ...), by the running statistics: algorithm 2, step 11.

    The mean is subtracted before the multiplication. If autograd differentiated
    scale * x + shift instead, the gradient of gamma would lose precision wherever the
    mean is large relative to the deviation.
    """
    centered = at_least_float32(x) - per_channel(running_mean, x)  # (N, C, ...)
    scale = (at_least_float32(running_var) + eps).rsqrt()  # (C,)
    if weight is not None:
        scale = scale * weight
    y = centered * per_channel(scale, x)  # (N, C, ...)
    return y if bias is None else y + per_channel(bias, x)


def values_per_channel(x: Tensor) -> int:
    """Return the number of values in each channel of x, (N, C, ...). The paper calls it m."""
    return x.size(0) * math.prod(x.shape[2:])


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """Return v, (C,), as (1, C, 1, ...), which broadcasts against x, (N, C, ...)."""
    return v.view((1, v.numel()) + (1,) * (x.dim() - 2))


def at_least_float32(x: Tensor) -> Tensor:
    """Return x as float32 if its dtype has 16 bits or fewer, and x itself otherwise."""
    return x.float() if x.dtype.itemsize < 4 else x
