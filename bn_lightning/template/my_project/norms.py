"""Norms of your own. Add a class: its name here is the value of a flag, as in README.md."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Divide by the root mean square over the channels (Zhang and Sennrich 2019)."""

    def __init__(self, num_features: int, num_dims: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features, *[1] * (num_dims - 2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(1, keepdim=True) + self.eps).rsqrt()
