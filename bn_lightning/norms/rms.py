"""RMS normalization over the channels: division by the root mean square, without a mean.

Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019,
https://arxiv.org/abs/1910.07467, equation 4.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from bn_lightning.norms.definition import at_least_float32
from bn_lightning.norms.layer import check_num_dims
from bn_lightning.norms.memory_order import MemoryOrder
from bn_lightning.norms.shape_rules import require_num_dims, require_several_channels


def rms(num_features: int, num_dims: int, eps: float = 1e-5, affine: bool = True) -> nn.Module:
    """Build RMSNorm after a linear layer, or `ChannelRMSNorm` after a convolution.

    Raises:
        UserError: `num_dims` is not from 2 to 5, or there is one channel.
    """
    require_num_dims("rms", num_dims)
    # Divided by its root mean square, a single value is 1 or -1.
    require_several_channels("rms", num_features, "behind any layer")
    if num_dims == 2:
        return nn.RMSNorm(num_features, eps, affine)
    return ChannelRMSNorm(num_features, num_dims, eps, affine)


class ChannelRMSNorm(nn.RMSNorm):
    """RMS normalization of each position of each sample, over its C channels.

    For input (N, C, L), (N, C, H, W) or (N, C, D, H, W):

        y = gamma * x / sqrt(mean of x^2 over the channels + eps)

    The mean square is taken at each position separately. A transformer normalizes each
    token like this. `torch.nn.RMSNorm` expects the channels in the last dimension, and
    has the same state dict. There are no running statistics, so training and eval mode
    give the same output. 16-bit input is computed in float32.

    Args:
        num_features: the number of channels C.
        num_dims: the number of dimensions that the input must have.
        eps: added to the mean square.
        affine: learn gamma (`weight`, starts at 1). There is no beta.
    """

    def __init__(
        self, num_features: int, num_dims: int, eps: float = 1e-5, affine: bool = True
    ) -> None:
        super().__init__(num_features, eps, affine)
        self.num_features, self.num_dims = num_features, num_dims

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x, (N, C, ...). The result has its dtype and memory format.

        Raises:
            ValueError: the input does not have `num_dims` dimensions.
            RuntimeError: the input does not have C channels.
        """
        check_num_dims(x, self.num_dims)
        weight = None if self.weight is None else at_least_float32(self.weight)
        channels_last = at_least_float32(x).movedim(1, -1)  # (N, ..., C)
        y = F.rms_norm(channels_last, self.normalized_shape, weight, self.eps)
        y = y.movedim(-1, 1).to(x.dtype)  # (N, C, ...)
        return y if MemoryOrder.of(x).width else y.contiguous()
