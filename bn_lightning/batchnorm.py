"""Batch normalization from scratch, a drop-in for torch's BatchNorm1d, 2d and 3d.

Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
2015, https://arxiv.org/abs/1502.03167.
"""

import torch
from torch import Tensor, nn


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalize each channel of the input, then scale and shift it: algorithms 1 and 2 of the paper.

    The arguments are those of `torch.nn.functional.batch_norm`. With `training`, or without running statistics,
    mean and variance are those of the batch (equations of algorithm 1, the variance divided by m), and the running
    ones move towards them in place by `momentum`, the variance corrected by m / (m - 1) as in algorithm 2, step 10.

    Args:
        input: (N, C) or (N, C, ...), floating point. Arithmetic is in the precision of float32 at least.
        running_mean, running_var, weight (gamma), bias (beta): (C,) each, or None.

    Returns:
        A tensor of the input's shape and dtype.

    Raises:
        ValueError: when the batch's own variance is asked for and there is one value per channel: it is 0 whatever
            the value.
    """
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    per_channel = (1, -1) + (1,) * (x.dim() - 2)
    if training or running_mean is None or running_var is None:
        m = x.numel() // x.size(1)
        if m == 1:
            raise ValueError(
                f"Expected more than 1 value per channel to take their variance, got input size {input.size()}"
            )
        reduced = [d for d in range(x.dim()) if d != 1]
        mean = x.mean(reduced)
        centred = x - mean.view(per_channel)
        var = centred.square().mean(reduced)
        if training and m > 1:
            with torch.no_grad():
                if running_mean is not None:
                    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
                if running_var is not None:
                    running_var.lerp_((var * (m / (m - 1))).to(running_var.dtype), momentum)
    else:
        var = running_var.to(x.dtype)
        centred = x - running_mean.to(x.dtype).view(per_channel)
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    y = centred * scale.view(per_channel)
    if bias is not None:
        y = y + bias.view(per_channel)
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
    """

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

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input`, of the shapes that the class names.

        Raises:
            ValueError: for input of another rank than `num_dims`, of fewer than two dimensions, of another number of
                channels than `num_features`, of an integer dtype, or with one value per channel in training.
        """
        self._check(input)
        momentum = self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        return batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            0.0 if momentum is None else momentum,
            self.eps,
        )

    def _check(self, input: Tensor) -> None:
        shape = tuple(input.shape)
        if self.num_dims is not None and input.dim() != self.num_dims:
            raise ValueError(f"expected {self.num_dims}-d input, got {input.dim()}-d: {shape}")
        if input.dim() < 2:
            raise ValueError(f"expected input of two dimensions (N, C) or more, got {input.dim()}-d: {shape}")
        if input.size(1) != self.num_features:
            raise ValueError(f"expected {self.num_features} channels in dimension 1, got {input.size(1)}: {shape}")
        if not input.is_floating_point():
            raise ValueError(f"expected floating-point input, got {input.dtype}")

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}"
        )
