"""Batch normalization by the tutorial's conventions, kept for comparison with `layer.BatchNorm`.

The tutorial follows section 8.5, "Batch Normalization", of "Dive into Deep Learning", https://d2l.ai. It differs from
torch's layer in three ways, each kept here on purpose:

* training is told from prediction by whether gradients are recorded, not by `module.training`;
* the moving variance is the biased one: the batch's variance divided by m, with no correction;
* momentum is the share of the old value that is kept (0.9), where torch's is the share of the new one (0.1).
"""

from typing import ClassVar

import torch
from torch import Tensor, nn


def batch_norm(
    X: Tensor,
    gamma: Tensor,
    beta: Tensor,
    moving_mean: Tensor,
    moving_var: Tensor,
    eps: float,
    momentum: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize a batch, and return the result with the new moving mean and variance.

    Args:
        X: (N, C) behind a linear layer, or (N, C, H, W) behind a convolution.
        gamma, beta, moving_mean, moving_var: of a shape that broadcasts against X: (1, C) or (1, C, 1, 1).
        momentum: the share of the old moving statistics that is kept.
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
    """The tutorial's layer: `gamma`, `beta`, `moving_mean` and `moving_var`, of shape (1, C) or (1, C, 1, 1).

    The moving statistics are buffers: as plain tensors they would be lost in a checkpoint. The moving variance starts
    at 1, as the tutorial's text says (its code says 0).

    Args:
        num_features: the number of outputs of the linear layer, or of channels of the convolution, C.
        num_dims: 2 behind a linear layer, 4 behind a convolution.
        eps: added to the variance.
        momentum: the share of the old moving statistics that is kept.

    Attributes:
        only_writes_running_stats: True: in training the layer writes its moving statistics and
            never reads them; see `recognition.py`.
    """

    only_writes_running_stats: ClassVar[bool] = True

    moving_mean: Tensor
    moving_var: Tensor

    def __init__(
        self, num_features: int, num_dims: int, eps: float = 1e-5, momentum: float = 0.9
    ) -> None:
        super().__init__()
        shape = (1, num_features) if num_dims == 2 else (1, num_features, 1, 1)
        self.eps = eps
        self.momentum = momentum
        self.gamma = nn.Parameter(torch.ones(shape))
        self.beta = nn.Parameter(torch.zeros(shape))
        self.register_buffer("moving_mean", torch.zeros(shape))
        self.register_buffer("moving_var", torch.ones(shape))

    def forward(self, X: Tensor) -> Tensor:
        """Normalize X, of shape (N, C) or (N, C, H, W)."""
        Y, moving_mean, moving_var = batch_norm(
            X, self.gamma, self.beta, self.moving_mean, self.moving_var, self.eps, self.momentum
        )
        # Without this the moving statistics would carry the graph of every step since the first.
        self.moving_mean.copy_(moving_mean.detach())
        self.moving_var.copy_(moving_var.detach())
        return Y
