"""Batch renormalization: batch normalization that gives in training what it will give in eval mode.

Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models", 2017,
https://arxiv.org/abs/1702.03275, algorithm 1.
"""

import torch
from torch import Tensor, nn

from bn_lightning.errors import UserError
from bn_lightning.norms.definition import at_least_float32, per_channel, values_per_channel
from bn_lightning.norms.layer import check_input


class BatchRenorm(nn.Module):
    """Algorithm 1 of the paper, for a batch of any rank: (N, C) or (N, C, ...).

    With the mean m and deviation s = sqrt(var + eps) of each channel over the batch, and their moving averages M and S,

        r = s / S, clipped to [1 / r_max, r_max],  d = (m - M) / S, clipped to [-d_max, d_max],
        y = gamma * ((x - m) / s * r + d) + beta.

    Where nothing is clipped that is gamma * (x - M) / S + beta, the result in eval mode; with r = 1 and d = 0 it is
    batch normalization. r and d carry no gradient. Each process goes by its own batch.

    Args:
        num_features: the number of channels C.
        num_dims: when given, the rank that the input must have (2 behind a linear layer, 4 behind a convolution).
        eps: the default is that of `BatchNorm`, so that a comparison of the two is of r and d alone.
        momentum: the weight of the newest batch in the moving averages, the paper's alpha.
        r_max, d_max: the defaults are the paper's final values.
        warmup: after k batches r_max and d_max have come k / warmup of the way from 1 and 0, which is batch
            normalization; 0 sets them at once. The paper's arrive at steps 40,000 and 25,000; 500 is for runs of some
            2,000 steps, and lets the moving averages forget what they started from (0.99^500 < 0.01).

    Attributes:
        weight, bias, running_mean, running_std: gamma, beta, M and S, (C,). Like the paper's, S averages deviations and
            not variances: hence the name, by which a checkpoint of batch normalization is refused and not misread.

    Raises:
        UserError: r_max below 1, d_max or warmup below 0, or one of them not finite.
    """

    running_mean: Tensor
    running_std: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        num_dims: int | None = None,
        eps: float = 1e-5,
        momentum: float = 0.01,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup: int = 500,
    ) -> None:
        super().__init__()
        for name, value, least in (("r_max", r_max, 1), ("d_max", d_max, 0), ("warmup", warmup, 0)):
            if not least <= value < float("inf"):
                raise UserError(f"{name} is {value}; it must be at least {least}, and finite")
        self.num_features, self.num_dims = num_features, num_dims
        self.eps, self.momentum = eps, momentum
        self.r_max, self.d_max, self.warmup = r_max, d_max, warmup
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_std", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input`. Arithmetic is in float32 at least, and the result of the input's shape and dtype.

        Raises:
            ValueError: input of another rank than `num_dims`, or of another dtype or number of channels than the
                parameters (16-bit input goes with float32 ones), or with less than 2 values per channel in training.
        """
        if self.num_dims is not None and input.dim() != self.num_dims:
            raise ValueError(
                f"expected {self.num_dims}-d input, got {input.dim()}-d: {tuple(input.shape)}"
            )
        running = self.running_mean, self.running_std
        check_input(input, *running, self.training, self.eps, self.weight, self.bias)
        x = at_least_float32(input)
        if self.training:
            if values_per_channel(x) < 2:
                raise ValueError(
                    f"expected more than 1 value per channel in training, got input of {tuple(x.shape)}"
                )
            reduced = [dim for dim in range(x.dim()) if dim != 1]
            mean = x.mean(reduced)
            centred = x - per_channel(mean, x)
            std = (centred.square().mean(reduced) + self.eps).sqrt()
            r, d = self._correct_and_track(mean.detach(), std.detach())
            scale, shift = self.weight * r / std, self.bias + self.weight * d
        else:
            centred = x - per_channel(self.running_mean, x)
            scale, shift = self.weight / at_least_float32(self.running_std), self.bias
        return (centred * per_channel(scale, x) + per_channel(shift, x)).to(input.dtype)

    def _correct_and_track(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """r and d, (C,), by the moving averages as they were before this batch, which then enters them."""
        seen = self.num_batches_tracked.to(
            std.dtype
        )  # stays a tensor: to read it would hold up a GPU at every step
        grown = torch.where(seen < self.warmup, seen / max(self.warmup, 1), 1.0)
        r_max, d_max = 1 + (self.r_max - 1) * grown, self.d_max * grown
        r = (std / self.running_std).clamp(1 / r_max, r_max)
        d = ((mean - self.running_mean) / self.running_std).clamp(-d_max, d_max)
        for running, value in ((self.running_mean, mean), (self.running_std, std)):
            running.lerp_(value.to(running.dtype), self.momentum)
        self.num_batches_tracked.add_(1)
        return r, d

    def extra_repr(self) -> str:
        names = ("eps", "momentum", "r_max", "d_max", "warmup")
        return ", ".join(
            [str(self.num_features), *(f"{name}={getattr(self, name)}" for name in names)]
        )
