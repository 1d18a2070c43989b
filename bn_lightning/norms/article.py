"""The tutorial's batch normalization, with the tutorial's conventions.

The tutorial follows section 8.5, "Batch Normalization", of "Dive into Deep Learning",
https://d2l.ai. Its layer differs from PyTorch's in three ways. All three are kept here,
so that they can be compared with `layer.BatchNorm`:

* The mode follows `torch.is_grad_enabled()`, not `module.training`.
* The moving variance is biased: it averages batch variances that are divided by m, not m - 1.
* Momentum is the weight of the old value (0.9). PyTorch's is the weight of the new one (0.1).

The first has a consequence: reentrant activation checkpointing runs the forward pass
without gradients, and therefore in eval mode. Use it with `use_reentrant=False`.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from bn_lightning.norms.shape_rules import require_num_dims


def batch_norm(
    X: Tensor,
    gamma: Tensor,
    beta: Tensor,
    moving_mean: Tensor,
    moving_var: Tensor,
    eps: float,
    momentum: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize a batch. Return the result, the new moving mean and the new moving variance.

    Args:
        X: (N, C) after a linear layer, or (N, C, H, W) after a convolution.
        gamma, beta, moving_mean, moving_var: (1, C) or (1, C, 1, 1), to broadcast
            against X.
        eps: added to the variance.
        momentum: the weight of the old moving statistics.
    """
    if not torch.is_grad_enabled():
        X_hat = (X - moving_mean) / torch.sqrt(moving_var + eps)
    else:
        dims = (0,) if X.dim() == 2 else (0, 2, 3)
        mean = X.mean(dim=dims, keepdim=True)
        var = ((X - mean) ** 2).mean(dim=dims, keepdim=True)
        X_hat = (X - mean) / torch.sqrt(var + eps)
        moving_mean = momentum * moving_mean + (1.0 - momentum) * mean
        moving_var = momentum * moving_var + (1.0 - momentum) * var
    return gamma * X_hat + beta, moving_mean, moving_var


class BatchNorm(nn.Module):
    """The tutorial's layer.

    The moving statistics are buffers. As plain tensors, they would be missing from
    checkpoints. The moving variance starts at 1, as in the tutorial's text. Its code
    starts at 0.

    Args:
        num_features: the number of channels C: outputs of a linear layer or of a
            convolution.
        num_dims: 2 after a linear layer, 4 after a convolution.
        eps: added to the variance.
        momentum: the weight of the old moving statistics.

    Attributes:
        gamma, beta: scale and shift, (1, C) or (1, C, 1, 1).
        moving_mean, moving_var: the moving statistics, of the same shape.
        only_writes_running_stats: True. In training, the layer writes its moving
            statistics but never reads them. See `recognition.py`.

    Raises:
        UserError: `num_dims` is neither 2 nor 4.
    """

    only_writes_running_stats: ClassVar[bool] = True

    moving_mean: Tensor
    moving_var: Tensor

    def __init__(
        self, num_features: int, num_dims: int, eps: float = 1e-5, momentum: float = 0.9
    ) -> None:
        super().__init__()
        require_num_dims("article", num_dims, (2, 4))
        shape = (1, num_features) if num_dims == 2 else (1, num_features, 1, 1)
        self.eps = eps
        self.momentum = momentum
        self.gamma = nn.Parameter(torch.ones(shape))
        self.beta = nn.Parameter(torch.zeros(shape))
        self.register_buffer("moving_mean", torch.zeros(shape))
        self.register_buffer("moving_var", torch.ones(shape))

    def forward(self, X: Tensor) -> Tensor:
        """Normalize X, (N, C) or (N, C, H, W)."""
        Y, moving_mean, moving_var = batch_norm(
            X, self.gamma, self.beta, self.moving_mean, self.moving_var, self.eps, self.momentum
        )
        # Without detach, the moving statistics would keep the graph of every past step.
        self.moving_mean.copy_(moving_mean.detach())
        self.moving_var.copy_(moving_var.detach())
        return Y
