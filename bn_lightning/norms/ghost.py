"""Ghost batch normalization: batch normalization of the parts of a large batch.

Hoffer, Hubara and Soudry, "Train longer, generalize better: closing the generalization
gap in large batch training of neural networks", 2017, https://arxiv.org/abs/1705.08741,
algorithm 1.
"""

import torch
from torch import Tensor

from bn_lightning.errors import UserError
from bn_lightning.norms.definition import values_per_channel
from bn_lightning.norms.layer import BatchNorm, check_num_dims
from bn_lightning.norms.shape_rules import require_num_dims


class GhostBatchNorm(BatchNorm):
    """Batch normalization that splits a batch into virtual batches in training.

    Each virtual batch has `virtual_batch_size` consecutive samples, and is normalized by
    its own statistics. The last one may be smaller. If it has a single value per
    channel, it is merged with the one before it.

    Every virtual batch updates the running statistics, in order, as if `BatchNorm` were
    called for each of them. `num_batches_tracked` counts virtual batches. With
    `momentum` None, all virtual batches therefore have the same weight. Eval mode uses
    the running statistics.

    The state dict is that of `BatchNorm`. Each process splits its own shard of a batch,
    and statistics are not synchronized between processes.

    Args:
        num_features: the number of channels C.
        num_dims: if given, the number of dimensions that the input must have, from 2 to 5.
        virtual_batch_size: the number of samples of a virtual batch.
        eps, momentum, affine, bias: see `BatchNorm`.
        track_running_stats: see `BatchNorm`. Without running statistics, eval mode
            splits the batch too.

    Raises:
        UserError: `num_dims` is not from 2 to 5, or `virtual_batch_size` is not an
            integer that is at least 1, or at least 2 after a linear layer.
    """

    def __init__(
        self,
        num_features: int,
        num_dims: int | None = None,
        virtual_batch_size: int = 32,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
    ) -> None:
        if num_dims is not None:
            require_num_dims("ghost", num_dims)
        least = 2 if num_dims == 2 else 1
        if not isinstance(virtual_batch_size, int) or virtual_batch_size < least:
            place = "behind a linear layer, " if num_dims == 2 else ""
            raise UserError(
                f"virtual_batch_size is {virtual_batch_size!r}; {place}it must be an integer that "
                f"is at least {least}, for example 32."
            )
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, bias=bias, num_dims=num_dims
        )
        self.virtual_batch_size = virtual_batch_size
        # Without a boolean attribute of this name, `LayerSync` refuses the layer.
        self.sync_batchnorm = None  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input`, (N, C) or (N, C, ...).

        Raises:
            ValueError: see `BatchNorm`. In training, each virtual batch must have more
                than one value per channel.
        """
        normalize = super().forward
        uses_running_stats = not self.training and self.running_mean is not None
        if uses_running_stats or input.dim() < 2:
            return normalize(input)
        check_num_dims(input, self.num_dims)
        parts = self._virtual_batches(input)
        if len(parts) == 1:
            return normalize(input)
        return torch.cat([normalize(part) for part in parts])

    def _virtual_batches(self, input: Tensor) -> list[Tensor]:
        """Return the virtual batches of a batch, as views."""
        size, count = self.virtual_batch_size, input.size(0)
        sizes = [size] * (count // size)
        rest = count % size
        if rest and sizes and values_per_channel(input[-rest:]) == 1:
            sizes[-1] += rest
        elif rest:
            sizes.append(rest)
        return [input] if len(sizes) < 2 else list(torch.split(input, sizes))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, virtual_batch_size={self.virtual_batch_size}"
