"""Batch normalization with few passes over memory and a hand-derived gradient.

The results equal those of `definition.py`, up to rounding. On a CPU, most of the time is
spent on reading and writing tensors of the input's size. Three rules reduce this time.
Each tensor is read in memory order. For 32-bit input, at most one temporary tensor of
its size is allocated in addition to the result. The input is the only tensor of that
size that is saved for the backward pass. With a process group, the statistics are
computed over the batches of all its processes.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from bn_lightning.norms.batch_statistics import batch_statistics
from bn_lightning.norms.definition import at_least_float32, per_channel, values_per_channel
from bn_lightning.norms.memory_order import MemoryOrder


def normalize_batch(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    group: Any = None,
    track: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Return y of `definition.normalize_batch`, in the dtype of the input.

    Args:
        input: (N, C) or (N, C, ...), of any floating-point dtype.
        weight, bias, eps: see `definition.normalize_batch`.
        group: a process group. The statistics are then computed over the batches of all
            its processes, and second derivatives raise a RuntimeError.
        track: is called with the mean and the unbiased variance, (C,) each.
    """
    y: Tensor = Normalize.apply(input, weight, bias, None, eps, group, track)
    return y


def normalize_with_running_stats(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Return `definition.normalize_with_running_stats`, in the dtype of the input.

    The gradient does not depend on later updates of the running statistics.
    """
    arguments = (input, weight, bias, (running_mean, running_var), eps, None, None)
    if not torch.is_grad_enabled():
        return _normalize(*arguments)[0]
    y: Tensor = Normalize.apply(*arguments)
    return y


def needs_plain_operations() -> bool:
    """Return whether PyTorch must see each operation instead of this module's function.

    torch.compile fuses separate operations. Tracing, forward-mode AD, torch.func and
    batched gradients do not support the function.
    """
    # PyTorch has no public equivalents of the private names.
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._dispatch_tls_is_dispatch_key_included("VmapMode")
    )


class Normalize(torch.autograd.Function):
    """Normalization by running statistics or by those of the batch, with its gradient.

    With rstd = 1 / sqrt(var + eps) and x_hat = (x - mean) * rstd, the output is
    y = weight * x_hat + bias. Sums run over the m values of a channel, and d_v is the
    gradient of the loss with respect to v:

        d_bias = sum(d_y)        d_weight = sum(d_y * x_hat)

    Running statistics are constants, so d_x = weight * rstd * d_y. The statistics of the
    batch depend on x, so d_x has three terms. Let g = weight * d_y be the gradient of
    x_hat:

        directly:              rstd * g
        through the mean:      -rstd * sum(g) / m
        through the variance:  -rstd * x_hat * sum(g * x_hat) / m

    The third term is a product of three factors:

        gradient of rstd:  sum(g * (x - mean))
        d rstd / d var:    -rstd^3 / 2
        d var / d x:       2 * (x - mean) / m

    The sum of the three terms is the gradient in section 3 of the paper:

        d_x = weight * rstd * (d_y - d_bias / m - x_hat * d_weight / m)
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor | None, *arguments: Any) -> Tensor:
        y, mean, rstd, ctx.m = _normalize(input, weight, *arguments)
        # The next training step may change a buffer. The backward pass needs this value.
        mean = mean if ctx.m is not None else mean.clone()
        ctx.save_for_backward(input, weight, mean, rstd)
        _, _, ctx.eps, ctx.group, _ = arguments
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        # Gradients are enabled in a backward pass only with create_graph=True, that is
        # for a second derivative.
        if torch.is_grad_enabled() or needs_plain_operations():
            return *_gradients_in_plain_operations(ctx, grad), None, None, None, None

        input, weight, mean, rstd = ctx.saved_tensors
        scale = rstd if weight is None else rstd * weight
        needs_input, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        order, m = MemoryOrder.of(input), ctx.m
        x, dy = order.view(input), order.view(grad)
        d_input: Any = None
        d_weight: Any = None
        d_bias: Any = None
        if needs_bias or m is not None:
            d_bias = order.sums(dy)
        if needs_weight or m is not None:
            # sum(x * dy) - mean * sum(dy) takes less time. But a mean that is large
            # relative to the deviation would cancel, and precision would be lost.
            d_weight = order.sums((x - order.broadcast(mean)).mul_(dy)).mul_(rstd)
        if needs_input and m is None:
            d_input = order.unview(dy * order.broadcast(scale), input)
        elif needs_input:
            sum_dy, sum_dy_x_hat = d_bias, d_weight
            if ctx.group is not None:
                # d_x needs the sums over all processes. The returned d_weight and d_bias
                # are those of this process, because DDP averages them.
                sums = torch.stack([d_bias, d_weight])
                dist.all_reduce(sums, group=ctx.group)
                sum_dy, sum_dy_x_hat = sums[0], sums[1]
            # d_x is computed as a * x + b + scale * d_y, which takes fewer passes over
            # memory than the formula.
            slope, scale_by_m = sum_dy_x_hat * rstd, scale / -m
            shift = torch.addcmul(sum_dy, slope, mean, value=-1).mul_(scale_by_m)
            dx = order.scale_and_shift(x, slope.mul_(scale_by_m), shift)
            d_input = order.unview(dx.addcmul_(dy, order.broadcast(scale)), input)
        d_weight, d_bias = d_weight if needs_weight else None, d_bias if needs_bias else None
        return d_input, d_weight, d_bias, None, None, None, None


def _normalize(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_stats: tuple[Tensor, Tensor] | None,
    eps: float,
    group: Any,
    track: Callable[[Tensor, Tensor], None] | None,
) -> tuple[Tensor, Tensor, Tensor, int | Tensor | None]:
    """Return y, mean, rstd and m. With running statistics, m is None."""
    order = MemoryOrder.of(input)
    x = order.view(input)
    m: int | Tensor | None = None
    if running_stats is None:
        count = values_per_channel(input)
        mean, var, unbiased_var, m = batch_statistics(x, order, count, group)
        # With activation checkpointing, PyTorch's layer tracks both forward passes. The
        # second may end at save_for_backward, so this must precede it.
        if track is not None:
            track(mean, unbiased_var)
    else:
        mean, var = (at_least_float32(value) for value in running_stats)
    rstd = (var + eps).rsqrt_()
    scale = rstd if weight is None else rstd * weight
    shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)

    # y itself is not a view. Autograd refuses to change views in place that come from a
    # function with a gradient of its own.
    y = order.empty_like(input)
    order.scale_and_shift(x, scale, shift, out=order.view(y))
    return y.to(input.dtype), mean, rstd, m


def _gradients_in_plain_operations(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients with respect to input, weight and bias, which are differentiable.

    Raises:
        RuntimeError: the statistics are synchronized between processes.
    """
    if ctx.group is not None:
        raise RuntimeError(
            "Synchronized batch_norm supports neither second derivatives nor batched "
            "gradients. Set sync_batchnorm to False, or train with one process."
        )
    input, weight, mean, rstd = ctx.saved_tensors
    x, dy = at_least_float32(input), at_least_float32(grad)
    all_but_channels = [d for d in range(x.dim()) if d != 1]
    if ctx.m is not None:
        # The statistics are functions of x, and have a gradient too.
        mean = x.sum(all_but_channels) / ctx.m
        var = (x - per_channel(mean, x)).square().sum(all_but_channels) / ctx.m
        rstd = (var + ctx.eps).rsqrt()
    x_hat = (x - per_channel(mean, x)) * per_channel(rstd, x)
    d_bias = dy.sum(all_but_channels)
    d_weight = (dy * x_hat).sum(all_but_channels)
    if ctx.m is not None:
        dy = dy - per_channel(d_bias / ctx.m, x) - x_hat * per_channel(d_weight / ctx.m, x)
    d_input = dy * per_channel(rstd if weight is None else rstd * weight, x)
    needed = zip((d_input, d_weight, d_bias), ctx.needs_input_grad, strict=False)
    return tuple(gradient if is_needed else None for gradient, is_needed in needed)
