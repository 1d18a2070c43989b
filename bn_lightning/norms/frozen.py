"""Batch normalization with fixed statistics and fixed gamma and beta."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bn_lightning.norms.layer import batch_norm, check_num_dims
from bn_lightning.norms.shape_rules import require_num_dims


class FrozenBatchNorm(nn.Module):
    """Batch normalization in eval mode that training does not change: an affine map per channel.

    It is for networks whose norms are trained already. They are trained further in
    batches that are too small for new statistics. A new layer has mean 0 and variance 1,
    and therefore normalizes nothing.

    `torchvision.ops.FrozenBatchNorm2d` is this layer for 4 dimensions. It returns float32
    for 16-bit input if its buffers are float32. This layer accepts 2 to 5 dimensions,
    and returns the dtype of the input. Both have the same state dict, and load that of a
    batch normalization.

    Args:
        num_features: the number of channels C.
        num_dims: if given, the number of dimensions that the input must have, from 2 to 5.
        eps: added to the variance.

    Attributes:
        weight, bias, running_mean, running_var: buffers, (C,) each.
        has_fixed_statistics: True. See `recognition.py`.

    Raises:
        UserError: `num_dims` is not from 2 to 5.
    """

    has_fixed_statistics: ClassVar[bool] = True

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, num_dims: int | None = None, eps: float = 1e-5) -> None:
        super().__init__()
        if num_dims is not None:
            require_num_dims("frozen", num_dims)
        self.num_features, self.num_dims, self.eps = num_features, num_dims, eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input`, (N, C) or (N, C, ...). 16-bit input is computed in float32.

        Raises:
            ValueError: the input does not have `num_dims` dimensions, or see
                `batch_norm`.
        """
        check_num_dims(input, self.num_dims)
        statistics = self.running_mean, self.running_var
        return batch_norm(input, *statistics, self.weight, self.bias, eps=self.eps)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Batch normalization counts its batches.
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"
