"""The residual network for small images, with a configurable normalization layer.

He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", 2016,
https://arxiv.org/abs/1512.03385, section 4.2.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from bn_lightning.errors import UserError
from bn_lightning.norms.registry import NormFactory

DEPTHS = (8, 14, 20, 32, 44, 56)


class ResNet(nn.Module):
    """The CIFAR form of ResNet: 6n + 2 layers, three stages of n blocks, and no bottlenecks.

    With depth 20, width 16 and colour images, it has 0.27 million parameters, as in the
    paper (table 6). Convolutions are initialized as in the paper's reference [13] (He
    et al. 2015). The last linear layer starts with small weights, so that the first
    logits are close to 0. With torch's default initialization, the first steps amplify
    rounding errors a hundredfold.

    Args:
        in_channels: channels of the images.
        image_size: height and width of the images, at least 4 each.
        num_classes: number of logits.
        norm: builds a normalization layer, `norm(num_features, num_dims)`.
        depth: number of layers with weights: 8, 14, 20, 32, 44 or 56.
        width: channels of the first stage. Each further stage has twice as many.

    Raises:
        UserError: depth or width is not allowed.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: tuple[int, int],
        num_classes: int,
        norm: NormFactory,
        depth: int = 20,
        width: int = 16,
    ) -> None:
        super().__init__()
        if depth not in DEPTHS:
            raise UserError(f"depth is {depth}; it must be one of {', '.join(map(str, DEPTHS))}.")
        if width < 1:
            raise UserError(f"width is {width}; it must be at least 1, for example 16.")
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.norm = norm(width, 4)
        self.relu = nn.ReLU(inplace=True)
        blocks = []
        channels = width
        for stage in range(3):
            for block in range((depth - 2) // 6):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(Block(channels, width * 2**stage, stride, norm))
                channels = width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, num_classes) for images (N, C, H, W)."""
        x = self.relu(self.norm(self.conv(images)))  # (N, width, H, W)
        x = self.blocks(x)  # (N, 4 width, H / 4, W / 4)
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut: the identity, without parameters (option A).

    If the block has more channels than its input, the shortcut has zeros in the further
    channels. If the stride is 2, it has every second row and column.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, norm: NormFactory) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.norm1 = norm(channels, 4)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = norm(channels, 4)
        self.relu = nn.ReLU(inplace=True)
        self.stride, self.new_channels = stride, channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            x = F.pad(x, (0, 0, 0, 0, 0, self.new_channels))
        return self.relu(y + x)  # type: ignore[no-any-return]
