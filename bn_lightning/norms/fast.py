"""Batch normalization with few passes over memory and a gradient derived by hand.

The results are those of `definition.py`. On a CPU, what takes time is to read and write tensors of
the input's size. Each tensor is therefore read in the order in which it lies in memory, at most one
is allocated beside the result, and only the input is kept for the backward pass. The statistics may
be those of one process, or of the batches of all processes of a group together.
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
    """`definition.normalize_batch` with the gradient of section 3 of the paper.

    `FastBatchNorm.apply(input, weight, bias, eps, group)` returns the same three tensors. With a
    process group, the statistics are those of the batches of all its processes together.
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
        less_1: int | Tensor = max(m - 1, 1)
        if group is not None:
            mean, squares, total = _merge(mean, squares, count, group)
            m, less_1 = total.clamp(min=1), (total - 1).clamp(min=1)

        rstd = (squares / m).add_(eps).rsqrt_()
        scale = rstd if weight is None else rstd * weight
        shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
        y = _unview(_scale_and_shift(x, width, scale, shift), width, input)

        ctx.save_for_backward(input, weight, mean, rstd, scale)
        ctx.width, ctx.m, ctx.eps, ctx.group = width, m, eps, group
        unbiased_var = squares.div_(less_1)
        ctx.mark_non_differentiable(mean, unbiased_var)
        ctx.set_materialize_grads(False)
        return y if y.dtype == input.dtype else y.to(input.dtype), mean, unbiased_var

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """Return the gradients by input, weight and bias.

        With x_hat = (x - mean) * rstd, and sums over the m values of a channel:

        d bias = sum(dy),  d weight = sum(dy * x_hat),
        dx = weight * rstd * (dy - d bias / m - x_hat * d weight / m).
        """
        if grad is None:
            return None, None, None, None, None
        input, weight, mean, rstd, scale = ctx.saved_tensors
        # Gradients are recorded during a backward pass if a second derivative is wanted.
        if torch.is_grad_enabled():
            return *_gradient_of_definition(ctx, input, weight, grad), None, None

        width, m = ctx.width, ctx.m
        x, dy = _view(input, width), _view(grad, width)
        d_bias = _channel_sums(dy, width)
        d_weight = torch.addcmul(_channel_sums(x * dy, width), mean, d_bias, value=-1).mul_(rstd)
        sums = d_bias, d_weight
        if ctx.group is not None:
            stacked = torch.stack(sums)
            dist.all_reduce(stacked, group=ctx.group)
            sums = stacked[0], stacked[1]

        # dx = scale * (dy - sums[0] / m - (x - mean) * slope / m), multiplied out to
        # a * dy + b * x + c.
        slope, scale_by_m = sums[1] * rstd, scale / -m
        shift = torch.addcmul(sums[0], slope, mean, value=-1).mul_(scale_by_m)
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
    """Return autograd's gradients by input, weight and bias, which can be differentiated again."""
    if ctx.group is not None:
        raise RuntimeError("batch_norm across processes has no second derivative")
    y, _, _ = normalize_batch(at_least_float32(input), weight, None, ctx.eps)
    needs_input, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    candidates = ((input, needs_input), (weight, needs_weight))
    wanted = [t for t, needed in candidates if t is not None and needed]
    grads: list[Tensor] = []
    if wanted:
        grads += torch.autograd.grad(y, wanted, grad.to(y.dtype), create_graph=True)
    d_input = grads.pop(0) if needs_input else None
    d_weight = grads.pop(0) if needs_weight else None
    d_bias = grad.sum([d for d in range(grad.dim()) if d != 1]) if needs_bias else None
    return d_input, d_weight, d_bias


def _merge(mean: Tensor, squares: Tensor, count: int, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, sum of squared deviations and number of values per channel over all processes.

    Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances", 1979: the squared deviations from the common mean are those from each process's own
    mean, plus those of that mean. A process may have any number of values, even one or none.
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
    """`definition.normalize_with_running_stats` in one pass over memory, in float32 at least."""
    scale, shift = evaluation_scale_and_shift(running_mean, running_var, weight, bias, eps)
    width = _width(x)
    return _unview(_scale_and_shift(_view(x, width), width, scale, shift), width, x)


# The helpers below work on a view of a tensor that has the order of its memory. `width` says which:
# 0 is the usual order, viewed as (N, C, L). W is channels-last order, viewed as rows (R, W * C).
# Rows (R * W, C) would leave a CPU's vector units idle where channels are few. A tensor (N, C)
# consists of rows already, with W = 1.


def _width(x: Tensor) -> int:
    if x.dim() == 2:
        return 1
    last = x.movedim(1, -1)
    return last.size(-2) if last.is_contiguous() and not x.is_contiguous() else 0


def _view(x: Tensor, width: int) -> Tensor:
    """Return the view of x, in float32 or float64; a copy if x lies in another order."""
    x = at_least_float32(x)
    if x.dim() == 2:
        return x
    if width:
        rows = x.size(0) * math.prod(x.shape[2:-1])
        return x.movedim(1, -1).reshape(rows, width * x.size(1))
    return x.reshape(x.size(0), x.size(1), math.prod(x.shape[2:]))


def _unview(view: Tensor, width: int, x: Tensor) -> Tensor:
    """Return the tensor that a view shows, in the shape of x."""
    if x.dim() == 2:
        return view
    return view.view(x.movedim(1, -1).shape).movedim(-1, 1) if width else view.view(x.shape)


def _channel_sums(view: Tensor, width: int) -> Tensor:
    """Return the sum of each channel, (C,)."""
    if not width:
        # With few channels this is several times faster than .sum((0, 2)).
        return view.sum(2).sum(0)
    row = view.sum(0)
    return row if width == 1 else row.view(width, -1).sum(0)


def _broadcast(v: Tensor, width: int) -> Tensor:
    """Return v, (C,), in a shape that broadcasts against a view."""
    if not width:
        return v.unsqueeze(1)
    return v if width == 1 else v.expand(width, -1).reshape(-1)


def _scale_and_shift(view: Tensor, width: int, scale: Tensor, shift: Tensor) -> Tensor:
    scale, shift = _broadcast(scale, width), _broadcast(shift, width)
    # addcmul takes one pass, but is slow where two operands are broadcast along the last dimension.
    return torch.addcmul(shift, view, scale) if width else (view * scale).add_(shift)
