"""Batch normalization from scratch, a drop-in for torch's BatchNorm1d, 2d and 3d.

Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
2015, https://arxiv.org/abs/1502.03167. `_definition` is algorithm 1 as the paper has it, left to autograd. `_Fast` has
the same results in less time, and across processes. `batch_norm` and `BatchNorm` choose between the two.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad


def _definition(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1 of the paper: y, of x's shape (N, C, ...).

    With it the mean of each channel, (C,), and its variance as algorithm 2 wants it in step 10, times m / (m - 1).
    """
    reduced = [d for d in range(x.dim()) if d != 1]
    m = _values_per_channel(x)
    mean = x.sum(reduced) / max(m, 1)  # of nothing: 0, so that gradients are 0 and not NaN
    centred = x - _per_channel(mean, x)
    deviation = centred.square().sum(reduced)
    var = deviation / max(m, 1)
    y = centred * _per_channel((var + eps).rsqrt(), x)
    if weight is not None:
        y = y * _per_channel(weight, x)
    if bias is not None:
        y = y + _per_channel(bias, x)
    return y, mean.detach(), (deviation / max(m - 1, 1)).detach()


def _values_per_channel(x: Tensor) -> int:
    return x.numel() // x.size(1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype.itemsize < 4 else x


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    """v (C,), to broadcast against x (N, C, ...)."""
    return v.view((1, -1) + (1,) * (x.dim() - 2))


# The fast path walks each tensor in the order in which it lies in memory. `width` tells how: 0 for the usual order,
# whose view is (N, C, L); W for channels-last order, whose view is rows (R, W * C): to walk (R * W, C) would leave a
# CPU's vector units idle where channels are few. A tensor (N, C) is rows as it stands, with W = 1.


def _width(x: Tensor) -> int:
    if x.dim() == 2:
        return 1
    last = x.movedim(1, -1)
    return last.size(-2) if last.is_contiguous() and not x.is_contiguous() else 0


def _view(x: Tensor, width: int) -> Tensor:
    """The view of x, in float32 or float64; a copy where x lies in another order."""
    x = _at_least_float32(x)
    if x.dim() == 2:
        return x
    if width:
        return x.movedim(1, -1).reshape(x.size(0) * math.prod(x.shape[2:-1]), width * x.size(1))
    return x.reshape(x.size(0), x.size(1), math.prod(x.shape[2:]))


def _unview(view: Tensor, width: int, x: Tensor) -> Tensor:
    """The tensor of a view, in the shape of x."""
    if x.dim() == 2:
        return view
    return view.view(x.movedim(1, -1).shape).movedim(-1, 1) if width else view.view(x.shape)


def _total(view: Tensor, width: int) -> Tensor:
    """The sum of each channel, (C,)."""
    if not width:
        return view.sum(2).sum(0)  # several times faster than .sum((0, 2)) of few channels
    row = view.sum(0)
    return row if width == 1 else row.view(width, -1).sum(0)


def _spread(v: Tensor, width: int) -> Tensor:
    """v (C,), to broadcast against a view."""
    if not width:
        return v.unsqueeze(1)
    return v if width == 1 else v.expand(width, -1).reshape(-1)


def _scale_and_shift(view: Tensor, width: int, scale: Tensor, shift: Tensor) -> Tensor:
    scale, shift = _spread(scale, width), _spread(shift, width)
    # addcmul takes one pass, but is slow where two operands are broadcast along the innermost dimension.
    return torch.addcmul(shift, view, scale) if width else (view * scale).add_(shift)


class _Fast(torch.autograd.Function):
    """`_definition` with few passes over memory, and with the gradient by hand: section 3 of the paper.

    On a CPU what takes time is to read and write tensors of the input's size. So each is walked in the order in which
    it lies, one at most is made beside the result, and only the input is kept for the backward pass. With a process
    group, the statistics are those of the batches of all its processes together.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        width = _width(input)
        x = _view(input, width)
        count = _values_per_channel(input)
        m: int | Tensor = max(count, 1)
        mean = _total(x, width).div_(m)
        deviation = _total((x - _spread(mean, width)).square_(), width)
        less_1: int | Tensor = max(m - 1, 1)
        if group is not None:
            mean, deviation, total = _merge(mean, deviation, count, group)
            m, less_1 = total.clamp(min=1), (total - 1).clamp(min=1)
        rstd = (deviation / m).add_(eps).rsqrt_()
        scale = rstd if weight is None else rstd * weight
        shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
        y = _unview(_scale_and_shift(x, width, scale, shift), width, input)
        ctx.save_for_backward(input, weight, mean, rstd, scale)
        ctx.width, ctx.m, ctx.eps, ctx.group = width, m, eps, group
        unbiased = deviation.div_(less_1)
        ctx.mark_non_differentiable(mean, unbiased)
        ctx.set_materialize_grads(False)
        return y if y.dtype == input.dtype else y.to(input.dtype), mean, unbiased

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """With x_hat = (x - mean) * rstd, and sums over the m values of a channel:

        d bias = sum(dy),  d weight = sum(dy * x_hat),
        dx = weight * rstd * (dy - d bias / m - x_hat * d weight / m).
        """
        if grad is None:
            return None, None, None, None, None
        input, weight, mean, rstd, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated in its turn
            return *_gradient_of_definition(ctx, input, weight, grad), None, None
        width, m = ctx.width, ctx.m
        x, dy = _view(input, width), _view(grad, width)
        d_bias = _total(dy, width)
        d_weight = torch.addcmul(_total(x * dy, width), mean, d_bias, value=-1).mul_(rstd)
        sums = d_bias, d_weight
        if ctx.group is not None:
            stacked = torch.stack(sums)
            dist.all_reduce(stacked, group=ctx.group)
            sums = stacked[0], stacked[1]
        # dx = scale * (dy - sums[0] / m - (x - mean) * slope / m), multiplied out for a, b and c of a * dy + b * x + c
        slope, scale_by_m = sums[1] * rstd, scale / -m
        shift = torch.addcmul(sums[0], slope, mean, value=-1).mul_(scale_by_m)
        dx = _scale_and_shift(x, width, slope.mul_(scale_by_m), shift).addcmul_(dy, _spread(scale, width))
        _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        return _unview(dx, width, input), d_weight if needs_weight else None, d_bias if needs_bias else None, None, None


def _gradient_of_definition(ctx: Any, input: Tensor, weight: Tensor | None, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient by input, weight and bias as autograd has it, which can be differentiated again."""
    if ctx.group is not None:
        raise RuntimeError("batch_norm across processes has no second derivative")
    y, _, _ = _definition(_at_least_float32(input), weight, None, ctx.eps)
    needs_input, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    wanted = [t for t, needed in ((input, needs_input), (weight, needs_weight)) if t is not None and needed]
    grads = list(torch.autograd.grad(y, wanted, grad.to(y.dtype), create_graph=True)) if wanted else []
    d_input = grads.pop(0) if needs_input else None
    d_weight = grads.pop(0) if needs_weight else None
    d_bias = grad.sum([d for d in range(grad.dim()) if d != 1]) if needs_bias else None
    return d_input, d_weight, d_bias


def _merge(mean: Tensor, deviation: Tensor, count: int, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, sum of squared deviations and number of values per channel over all processes of the group.

    Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979: the
    deviations about the common mean are those about each process's own, plus those of its mean. The processes may have
    any number of values, even one or none.
    """
    own = torch.cat([mean, deviation, mean.new_tensor([count])])
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group=group)
    size = len(mean)
    means, deviations, counts = torch.stack(gathered).tensor_split([size, 2 * size], dim=1)
    total = counts.sum()
    mean = (means * counts).sum(0) / total.clamp(min=1)
    return mean, (deviations + counts * (means - mean).square()).sum(0), total


def _check(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    *rest: Tensor | None,
) -> None:
    if not input.is_floating_point():
        raise ValueError(f"expected floating-point input, got {input.dtype}")
    if input.dim() < 2:
        raise ValueError(f"expected input of two dimensions (N, C) or more, got shape {tuple(input.shape)}")
    channels, dtype = input.size(1), input.dtype
    for given in (running_mean, running_var, *rest):
        if given is None:
            continue
        if given.numel() != channels:
            raise ValueError(f"expected {given.numel()} channels in dimension 1, got shape {tuple(input.shape)}")
        if given.dtype != dtype and (given.dtype != torch.float32 or dtype.itemsize != 2):
            raise ValueError(f"expected {given.dtype} input, the dtype of parameters and statistics, got {dtype}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("expected running_mean and running_var both or neither, got one of them")
    if running_mean is None and not training:
        raise ValueError("expected running_mean and running_var, got None: they are needed where training is False")
    if training and eps <= 0:
        raise ValueError(f"expected eps above 0 in training, got {eps}")


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Normalize each channel of the input, then scale and shift it: algorithms 1 and 2 of the paper.

    The arguments are those of `torch.nn.functional.batch_norm`. With `training`, mean and variance are those of the
    batch (algorithm 1, the variance divided by m), and the running ones, where given, move towards them in place by
    `momentum`, the variance corrected by m / (m - 1) as in algorithm 2, step 10. Otherwise the running ones are used.

    Args:
        input: (N, C) or (N, C, ...), floating point. Arithmetic is in float32 at least, and the result in the input's
            dtype and memory format.
        running_mean, running_var, weight (gamma), bias (beta): (C,) each, or None; of the input's dtype, or float32
            where that is a 16-bit one.
        momentum: the weight of the batch in the running statistics.
        process_group: take the statistics in training over the batches of all processes of this group.

    Raises:
        ValueError: input, running statistics or parameters of another shape or dtype than that; no running statistics
            where they are needed; or one value per channel in training, whose variance is 0 whatever the value.
    """
    if input.dim() == 1 and not input.numel():
        return input.clone()  # nothing to normalize, and torch does not mind
    _check(input, running_mean, running_var, training, eps, weight, bias)
    if training and process_group is None and _values_per_channel(input) == 1:
        raise ValueError(f"expected more than 1 value per channel in training, got input of shape {tuple(input.shape)}")
    # Compilers fuse the definition themselves; forward-mode derivatives and torch.func go through it operation by
    # operation. The last two names are private to torch, which has no public ones for the question.
    by_definition = (
        torch.compiler.is_compiling() or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
    )
    if training:
        if by_definition and process_group is None:
            x = _at_least_float32(input)
            y, mean, var = _definition(x, weight, bias, eps)
        else:
            y, mean, var = _Fast.apply(input, weight, bias, eps, process_group)
        if running_mean is not None and running_var is not None and (input.numel() or process_group is not None):
            for running, value in ((running_mean, mean), (running_var, var)):
                running.lerp_(value if value.dtype == running.dtype else value.to(running.dtype), momentum)
        return y.to(input.dtype)
    assert running_mean is not None and running_var is not None  # _check has seen to it
    scale = (_at_least_float32(running_var) + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -running_mean * scale if bias is None else bias - running_mean * scale
    if by_definition:
        y = input * _per_channel(scale, input) + _per_channel(shift, input)
    else:
        width = _width(input)
        y = _unview(_scale_and_shift(_view(input, width), width, scale, shift), width, input)
    return y.to(input.dtype)


class BatchNorm(nn.Module):
    """Batch normalization over a batch of any rank: (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W).

    Arguments, attributes, state-dict keys, train and eval mode are those of `torch.nn.BatchNorm2d`, so that a
    checkpoint of one loads into the other. It does not inherit from torch's class: what looks for that class, such as
    `torch.nn.SyncBatchNorm.convert_sync_batchnorm`, would quietly put torch's own layer in its place.

    Args:
        num_features: the number of channels C.
        eps: added to the variance.
        momentum: the weight of the newest batch in the running statistics; None averages all batches alike.
        affine: learn gamma (`weight`, starts at 1) and beta (`bias`, starts at 0).
        track_running_stats: keep running statistics for eval mode; without them it uses the batch's own.
        bias: learn beta; without effect when `affine` is False.
        num_dims: when given, the rank that the input must have (2 behind a linear layer, 4 behind a convolution).

    Attributes:
        sync_batchnorm: take the statistics in training over the batches of all processes of the default group. Set by
            `Trainer(sync_batchnorm=True)` with the plugin of `sync.py`.
    """

    _version = 2  # of the state dict, as torch counts it
    sync_batchnorm: bool
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    num_batches_tracked: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        num_dims: int | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.num_dims = num_dims
        self.sync_batchnorm = False
        size = (num_features,)
        gamma = nn.Parameter(torch.ones(size, device=device, dtype=dtype)) if affine else None
        beta = nn.Parameter(torch.zeros(size, device=device, dtype=dtype)) if affine and bias else None
        self.register_parameter("weight", gamma)
        self.register_parameter("bias", beta)
        mean = var = count = None
        if track_running_stats:
            mean = torch.zeros(size, device=device, dtype=dtype)
            var = torch.ones(size, device=device, dtype=dtype)
            count = torch.tensor(0, device=device, dtype=torch.long)
        self.register_buffer("running_mean", mean)
        self.register_buffer("running_var", var)
        self.register_buffer("num_batches_tracked", count)

    def reset_running_stats(self) -> None:
        """Forget the running statistics."""
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Set all to what a fresh layer has."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input`, of the shapes that the class names.

        Raises:
            ValueError: for input of another rank than `num_dims`, and for what `batch_norm` refuses.
        """
        if self.num_dims is not None and input.dim() != self.num_dims:
            raise ValueError(f"expected {self.num_dims}-d input, got {input.dim()}-d: {tuple(input.shape)}")
        momentum: float | Tensor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None and self.running_mean is not None:
                momentum = 1 / self.num_batches_tracked.to(self.running_mean.dtype)
        tracks = self.track_running_stats or not self.training  # false: leave alone what may still be there
        spans = self.sync_batchnorm and self.training and dist.is_available() and dist.is_initialized()
        return batch_norm(
            input,
            self.running_mean if tracks else None,
            self.running_var if tracks else None,
            self.weight,
            self.bias,
            self.training or self.running_mean is None,
            momentum,
            self.eps,
            process_group=dist.group.WORLD if spans else None,
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Layers saved before torch 0.4.1 did not count their batches.
        version = args[0].get("version")
        if (version is None or version < 2) and self.num_batches_tracked is not None:
            state_dict.setdefault(prefix + "num_batches_tracked", self.num_batches_tracked)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"bias={self.bias is not None}, track_running_stats={self.track_running_stats}"
        )
