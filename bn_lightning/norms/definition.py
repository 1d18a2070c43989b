"""Batch normalization by its definition: plain operations whose gradients are left to autograd.

Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
Covariate Shift", 2015, https://arxiv.org/abs/1502.03167. Read this module first. `fast.py` has the
same results in less time, and `layer.py` chooses between the two.

In the comments on shapes, N is the number of samples in the batch and C the number of channels.
A batch is (N, C) behind a linear layer and (N, C, H, W) behind a two-dimensional convolution.
"""

from torch import Tensor


def normalize_batch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize each channel by the statistics of the batch: algorithm 1 of the paper.

    Args:
        x: (N, C) or (N, C, ...), in float32 or float64.
        weight, bias: gamma and beta, (C,) each, or None.
        eps: added to the variance.

    Returns:
        y, of the shape of x, and what `update_running_stats` needs: the mean of each channel and
        its unbiased variance, (C,) each, without gradient.
    """
    all_but_channels = [d for d in range(x.dim()) if d != 1]
    m = values_per_channel(x)
    # The mean of an empty batch is 0. Its gradients are then 0 and not NaN.
    mean = x.sum(all_but_channels) / max(m, 1)  # (C,)
    centred = x - per_channel(mean, x)  # (N, C, ...)
    squares = centred.square().sum(all_but_channels)  # (C,)
    var = squares / max(m, 1)  # (C,)
    y = centred * per_channel((var + eps).rsqrt(), x)  # (N, C, ...)
    if weight is not None:
        y = y * per_channel(weight, x)
    if bias is not None:
        y = y + per_channel(bias, x)
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

    The paper averages over batches. Here, as in PyTorch, the average is exponential:
    running = (1 - momentum) * running + momentum * value. All four tensors are (C,).
    """
    for running, value in ((running_mean, mean), (running_var, unbiased_var)):
        same_dtype = value if value.dtype == running.dtype else value.to(running.dtype)
        running.lerp_(same_dtype, momentum)


def normalize_with_running_stats(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Normalize each channel by the running statistics: algorithm 2, step 11.

    Each sample of x, (N, C, ...), is then normalized independently of the other ones.
    """
    scale, shift = evaluation_scale_and_shift(running_mean, running_var, weight, bias, eps)
    return x * per_channel(scale, x) + per_channel(shift, x)  # (N, C, ...)


def evaluation_scale_and_shift(
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return scale and shift, (C,) each, with which evaluation is y = scale * x + shift."""
    scale = (at_least_float32(running_var) + eps).rsqrt()  # (C,)
    if weight is not None:
        scale = scale * weight
    shift = -running_mean * scale if bias is None else bias - running_mean * scale  # (C,)
    return scale, shift


def values_per_channel(x: Tensor) -> int:
    """Return the number of values that each channel of x, (N, C, ...), has: m in the paper."""
    return x.numel() // x.size(1)


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """Return v, (C,), as (1, C, 1, ...), which broadcasts against x, (N, C, ...)."""
    return v.view((1, -1) + (1,) * (x.dim() - 2))


def at_least_float32(x: Tensor) -> Tensor:
    """Return x in float32 if its dtype has 16 bits, and x itself otherwise."""
    return x.float() if x.dtype.itemsize < 4 else x
