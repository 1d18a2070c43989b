"""Batch renormalization: batch normalization with nearly the same output in training and eval mode.

Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized
Models", 2017, https://arxiv.org/abs/1702.03275, algorithm 1.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bn_lightning.errors import UserError
from bn_lightning.norms.definition import at_least_float32, per_channel, values_per_channel
from bn_lightning.norms.layer import check_input, check_num_dims


class BatchRenorm(nn.Module):
    """Algorithm 1 of the paper, for input with two or more dimensions: (N, C) or (N, C, ...).

    m and s are the mean and the deviation, sqrt(var + eps), of a channel in the batch.
    M and S are their moving averages. In training:

        r = s / S, clipped to [1 / r_max, r_max]
        d = (m - M) / S, clipped to [-d_max, d_max]
        y = gamma * ((x - m) / s * r + d) + beta

    If nothing is clipped, y = gamma * (x - M) / S + beta, which is the output in eval
    mode. With r = 1 and d = 0, it is batch normalization. r and d carry no gradient.
    Each process uses the statistics of its own batch.

    M and S stay in float32 if the layer is converted to 16 bits, because 16 bits cannot
    represent the small steps of a moving average. With activation checkpointing, the
    second forward pass reuses r and d of the first, and leaves M and S unchanged. The
    layer must then be called once between two backward passes. If it is compiled too,
    checkpoint inside the compiled function.

    The paper's limits are r_max = 3 from step 40,000 and d_max = 5 from step 25,000.
    The default warmup of 500 batches suits runs of about 2,000 steps. After it, the
    initial values of the moving averages no longer matter (0.99^500 < 0.01).

    Args:
        num_features: the number of channels C.
        num_dims: if given, the number of dimensions that the input must have: 2 after a
            linear layer, 4 after a convolution.
        eps: added to the variance. The default is that of `BatchNorm`, so that the two
            differ in r and d only.
        momentum: the weight of the newest batch in the moving averages, alpha in the
            paper.
        r_max, d_max: the limits after the warmup. The defaults are the paper's final
            values.
        warmup: the number of batches during which the limits grow linearly from 1 and
            0, which is batch normalization, to r_max and d_max. 0 turns the warmup off.

    Attributes:
        weight, bias: gamma and beta, (C,).
        running_mean, running_std: M and S, (C,). S averages deviations, not variances,
            as in the paper. Because of the name `running_std`, a checkpoint of a
            BatchNorm does not load.

    Raises:
        UserError: r_max is below 1, d_max or warmup is below 0, or one of them is not
            finite.
    """

    running_mean: Tensor
    running_std: Tensor
    num_batches_tracked: Tensor
    # Mean, standard deviation, r and d of the newest batch, for activation checkpointing.
    _newest: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

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
                raise UserError(
                    f"{name} is {value}; it must be finite and at least {least}, for example "
                    f"{name}={least}."
                )
        self.num_features, self.num_dims = num_features, num_dims
        self.eps, self.momentum = eps, momentum
        self.r_max, self.d_max, self.warmup = r_max, d_max, warmup
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", at_least_float32(torch.zeros(num_features)))
        self.register_buffer("running_std", at_least_float32(torch.ones(num_features)))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input`, (N, C) or (N, C, ...). 16-bit input is computed in float32.

        Returns:
            A tensor with the shape and dtype of the input.

        Raises:
            ValueError: the input does not have `num_dims` dimensions; a shape or dtype
                does not fit; or a channel has fewer than 2 values in training.
        """
        check_num_dims(input, self.num_dims)
        running = self.running_mean, self.running_std
        check_input(input, *running, self.training, self.eps, self.weight, self.bias)
        x = at_least_float32(input)
        if self.training:
            if values_per_channel(x) < 2:
                raise ValueError(
                    "Expected more than 1 value per channel in training, "
                    f"got input of shape {tuple(x.shape)}."
                )
            all_but_channels = [d for d in range(x.dim()) if d != 1]
            mean = x.mean(all_but_channels)  # (C,)
            centered = x - per_channel(mean, x)  # (N, C, ...)
            std = (centered.square().mean(all_but_channels) + self.eps).sqrt()  # (C,)
            r, d = self._corrections(mean.detach(), std.detach())
            scale, shift = self.weight * r / std, self.bias + self.weight * d
        else:
            centered = x - per_channel(self.running_mean, x)
            # A copy, because the next training step changes the buffer.
            scale, shift = self.weight / self.running_std.clone(), self.bias
        y = centered * per_channel(scale, x) + per_channel(shift, x)
        return y.to(input.dtype)

    def _corrections(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Return r and d, (C,). Update the moving averages, unless the batch is recomputed.

        Raises:
            RuntimeError: in a backward pass, the batch is not the newest.
        """
        # In a backward pass, activation checkpointing calls the layer again. PyTorch has no
        # public equivalent of the private name. torch.compile does not call it again.
        is_eager = not torch.compiler.is_compiling()
        if is_eager and self._newest is not None and torch._C._current_graph_task_id() != -1:
            newest_mean, newest_std, r, d = self._newest
            # A comparison with NaN is False, so that NaN counts as equal.
            differs = ((mean - newest_mean).abs() > 1e-3 * std) | (
                (std / newest_std - 1).abs() > 1e-3
            )
            if differs.any():
                raise RuntimeError(
                    "BatchRenorm was called in a backward pass, with another batch than the "
                    "newest. With activation checkpointing, it must be called once between two "
                    "backward passes."
                )
            return r, d
        # The count stays a tensor. Reading its value would block the host on a GPU.
        seen = self.num_batches_tracked.to(std.dtype)
        progress = torch.where(seen < self.warmup, seen / max(self.warmup, 1), 1.0)
        r_max, d_max = 1 + (self.r_max - 1) * progress, self.d_max * progress
        r = (std / self.running_std).clamp(1 / r_max, r_max)
        d = ((mean - self.running_mean) / self.running_std).clamp(-d_max, d_max)
        for running, value in ((self.running_mean, mean), (self.running_std, std)):
            running.lerp_(value.to(running.dtype), self.momentum)
        self.num_batches_tracked.add_(1)
        if is_eager:
            self._newest = mean, std, r, d
        return r, d

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BatchRenorm":
        before = self.running_mean, self.running_std
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in zip(("running_mean", "running_std"), before, strict=True):
            converted = getattr(self, name)
            if converted.dtype.itemsize < 4:
                setattr(self, name, value.to(converted.device, torch.float32))
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_newest": None}

    def extra_repr(self) -> str:
        names = ("eps", "momentum", "r_max", "d_max", "warmup")
        settings = ", ".join(f"{name}={getattr(self, name)}" for name in names)
        return f"{self.num_features}, {settings}"
