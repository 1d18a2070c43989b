"""Batches for tests of batch normalization: shapes, memory layouts, and PyTorch's layers."""

import torch
from torch import nn

SHAPES = {2: (8, 5), 3: (8, 5, 7), 4: (8, 5, 6, 4), 5: (4, 5, 3, 2, 2)}
TORCH = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    # Channels are innermost, but the other dimensions are not in channels-last order.
    "reordered": lambda x: (
        x.transpose(0, -1).movedim(1, -1).contiguous().movedim(-1, 1).transpose(0, -1)
    ),
}


def scattered(shape, dtype=torch.float32, seed=0):
    """Return random values, with another mean and deviation in each channel."""
    generator = torch.Generator().manual_seed(seed)
    per_channel = (-1,) + (1,) * (len(shape) - 2)
    offset = torch.arange(shape[1], dtype=torch.float64).view(per_channel)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * (1 + offset) + 3 * offset
    return x.to(dtype)
