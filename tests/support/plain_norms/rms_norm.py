"""Division by the root mean square of the channels, Zhang and Sennrich 2019."""

import torch
from torch import nn


class RMSNorm(nn.Module):
    def __init__(self, num_features, num_dims, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features, *[1] * (num_dims - 2)))

    def forward(self, x):
        dtype = x.dtype
        if dtype in (torch.float16, torch.bfloat16):
            x = x.float()
        mean_square = x.square().mean(1, keepdim=True)
        y = self.weight * x / torch.sqrt(mean_square + self.eps)
        return y.to(dtype)
