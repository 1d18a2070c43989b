"""Batch normalization with few passes over memory and a hand-derived gradient.

The results equal those of `definition.py`. On a CPU, most of the time is spent on
reading and writing tensors of the input's size. Three rules reduce this time. Each
tensor is read in memory order. At most one temporary tensor of the input's size is
allocated in addition to the result. The input is the only tensor of that size that is
saved for the backward pass. With a process group, the statistics are computed over the
batches of all its processes.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bn_lightning.norms.definition import (
    at_least_float32,
    evaluation_scale_and_shift,
    normalize_batch,
    values_per_channel,
)


class FastBatchNorm(torch.autograd.Function):
    """`definition.normalize_batch` with the gradient from section 3 of the paper.

    `FastBatchNorm.apply(input, weight, bias, eps, group)` returns the same three
    tensors. If `group` is a process group, the statistics are computed over the batches
    of all its processes.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        width = _width(input)
        x = _view(input, width)
        count = values_per_channel(input)
        m: int | Tensor = max(count, 1)
        mean = _channel_sums(x, width).div_(m)
        squares = _channel_sums((x - _broadcast(mean, width)).square_(), width)
        m_minus_1: int | Tensor = max(m - 1, 1)
        if group is not None:
            mean, squares, total = _merge_statistics(mean, squares, count, group)
            m, m_minus_1 = total.clamp(min=1), (total - 1).clamp(min=1)

        rstd = (squares / m).add_(eps).rsqrt_()
        scale = rstd if weight is None else rstd * weight
        shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
        y = _unview(_scale_and_shift(x, width, scale, shift), width, input)

        ctx.save_for_backward(input, weight, mean, rstd, scale)
        ctx.width, ctx.m, ctx.eps, ctx.group = width, m, eps, group
        unbiased_var = squares.div_(m_minus_1)
        ctx.mark_non_differentiable(mean, unbiased_var)
        ctx.set_materialize_grads(False)
        return y if y.dtype == input.dtype else y.to(input.dtype), mean, unbiased_var

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """Return the gradients with respect to input, weight and bias.

        The sums run over the m values of a channel, and x_hat = (x - mean) * rstd:

            d_bias   = sum(dy)
            d_weight = sum(dy * x_hat)
            dx       = weight * rstd * (dy - d_bias / m - x_hat * d_weight / m)
        """
        if grad is None:
            return None, None, None, None, None
        input, weight, mean, rstd, scale = ctx.saved_tensors
        # Gradients are enabled in a backward pass only with create_graph=True, that is
        # for a second derivative.
        if torch.is_grad_enabled():
            return *_gradient_of_definition(ctx, input, weight, grad), None, None

        width, m = ctx.width, ctx.m
        x, dy = _view(input, width), _view(grad, width)
        d_bias = _channel_sums(dy, width)
        d_weight = torch.addcmul(_channel_sums(x * dy, width), mean, d_bias, value=-1).mul_(rstd)
        sum_dy, sum_dy_x_hat = d_bias, d_weight
        if ctx.group is not None:
            # dx needs the sums over all processes. The returned d_weight and d_bias are
            # those of this process, because DDP averages them.
            sums = torch.stack([d_bias, d_weight])
            dist.all_reduce(sums, group=ctx.group)
            sum_dy, sum_dy_x_hat = sums[0], sums[1]

        # dx = scale * (dy - sum_dy / m - (x - mean) * slope / m) is computed as
        # a * dy + b * x + c, which takes fewer passes over memory.
        slope, scale_by_m = sum_dy_x_hat * rstd, scale / -m
        shift = torch.addcmul(sum_dy, slope, mean, value=-1).mul_(scale_by_m)
        dx = _scale_and_shift(x, width, slope.mul_(scale_by_m), shift)
        dx = dx.addcmul_(dy, _broadcast(scale, width))

        _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        d_input = _unview(dx, width, input)
        return (
            d_input,
            d_weight if needs_weight else None,
            d_bias if needs_bias else None,
            None,
            None,
        )


def _gradient_of_definition(
    ctx: Any, input: Tensor, weight: Tensor | None, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of `definition.normalize_batch`, which are differentiable.

    Raises:
        RuntimeError: the statistics are synchronized between processes.
    """
    if ctx.group is not None:
        raise RuntimeError(
            "Synchronized batch_norm does not support second derivatives. "
            "Set sync_batchnorm to False, or train with one process."
        )
    y, _, _ = normalize_batch(at_least_float32(input), weight, None, ctx.eps)
    needs_input, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    candidates = ((input, needs_input), (weight, needs_weight))
    inputs = [t for t, needed in candidates if t is not None and needed]
    grads: list[Tensor] = []
    if inputs:
        grads += torch.autograd.grad(y, inputs, grad.to(y.dtype), create_graph=True)
    d_input = grads.pop(0) if needs_input else None
    d_weight = grads.pop(0) if needs_weight else None
    d_bias = grad.sum([d for d in range(grad.dim()) if d != 1]) if needs_bias else None
    return d_input, d_weight, d_bias


def _merge_statistics(
    mean: Tensor, squares: Tensor, count: int, group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the statistics of all processes.

    Each process adds two parts to the total sum of squared deviations: its `squares`,
    and its count * (its mean - total mean)^2. See Chan, Golub and LeVeque, "Updating
    Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979. A process
    may have any number of values, including 0.

    Args:
        mean: the mean of this process, (C,).
        squares: its sum of squared deviations from that mean, (C,).
        count: its number of values per channel.

    Returns:
        The same three values over all processes. The count is a scalar tensor.
    """
    own = torch.cat([mean, squares, mean.new_tensor([count])])
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group=group)
    size = len(mean)
    means, all_squares, counts = torch.stack(gathered).tensor_split([size, 2 * size], dim=1)
    total = counts.sum()
    mean = (means * counts).sum(0) / total.clamp(min=1)
    return mean, (all_squares + counts * (means - mean).square()).sum(0), total


def normalize_with_running_stats(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Compute `definition.normalize_with_running_stats` in one pass over memory.

    16-bit input is converted to float32.
    """
    scale, shift = evaluation_scale_and_shift(running_mean, running_var, weight, bias, eps)
    width = _width(x)
    return _unview(_scale_and_shift(_view(x, width), width, scale, shift), width, x)


# The helpers below work on a view of a tensor, whose dimensions are in memory order.
# `width` encodes the shape of the view:
#   0: the tensor is contiguous; the view is (N, C, L), with L values per channel.
#   W: the tensor is channels-last; the view is (R, W * C), with R rows. W is the size
#      of the last spatial dimension.
#   1: the tensor is (N, C), and so is the view.
# The rows have W * C values, because rows of C values would leave a CPU's vector units
# idle if C is small.


def _width(x: Tensor) -> int:
    """Return the `width` of x, as defined above."""
    if x.dim() == 2:
        return 1
    last = x.movedim(1, -1)
    return last.size(-2) if last.is_contiguous() and not x.is_contiguous() else 0


def _view(x: Tensor, width: int) -> Tensor:
    """Return the view of x, in float32 or float64.

    It is a copy if x is neither contiguous nor channels-last, or if it is 16-bit.
    """
    x = at_least_float32(x)
    if x.dim() == 2:
        return x
    if width:
        rows = x.size(0) * math.prod(x.shape[2:-1])
        return x.movedim(1, -1).reshape(rows, width * x.size(1))
    return x.reshape(x.size(0), x.size(1), math.prod(x.shape[2:]))


def _unview(view: Tensor, width: int, x: Tensor) -> Tensor:
    """Return a view in the shape of x. This is the inverse of `_view`."""
    if x.dim() == 2:
        return view
    return view.view(x.movedim(1, -1).shape).movedim(-1, 1) if width else view.view(x.shape)


def _channel_sums(view: Tensor, width: int) -> Tensor:
    """Return the sum over each channel of a view, (C,)."""
    if not width:
        # With few channels, two sums are several times faster than .sum((0, 2)).
        return view.sum(2).sum(0)
    row = view.sum(0)
    return row if width == 1 else row.view(width, -1).sum(0)


def _broadcast(v: Tensor, width: int) -> Tensor:
    """Return v, (C,), reshaped to broadcast against a view."""
    if not width:
        return v.unsqueeze(1)
    return v if width == 1 else v.expand(width, -1).reshape(-1)


def _scale_and_shift(view: Tensor, width: int, scale: Tensor, shift: Tensor) -> Tensor:
    """Return view * scale + shift, where scale and shift are (C,)."""
    scale, shift = _broadcast(scale, width), _broadcast(shift, width)
    # addcmul takes one pass over memory. It is slow if two operands are broadcast along
    # the last dimension, as in a view (N, C, L).
    return torch.addcmul(shift, view, scale) if width else (view * scale).add_(shift)
