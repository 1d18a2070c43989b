"""The network. Change its layers, or name another network in experiment.py."""

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor, nn


class ConvNet(nn.Module):
    """Map images (N, in_channels, height, width) to logits (N, num_classes).

    Args:
        image_size: height and width. This network works for any size from 8x8.
        norm: `norm(num_features, num_dims)` builds a layer of the chosen norm.
        width: channels of the first block; the flag is --model.network_args.width.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: tuple[int, int],
        num_classes: int,
        norm: Callable[[int, int], nn.Module],
        width: int = 16,
    ) -> None:
        super().__init__()
        channels = [in_channels, width, 2 * width, 4 * width]
        self.blocks = nn.Sequential()
        for before, after in pairwise(channels):
            convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
            block = nn.Sequential(convolution, norm(after, 4), nn.ReLU(), nn.MaxPool2d(2))
            self.blocks.append(block)
        self.head = nn.Linear(channels[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean((2, 3)))
