"""A multilayer perceptron, with a configurable normalization layer."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from bn_lightning.errors import UserError
from bn_lightning.norms.registry import NormFactory


class MLP(nn.Module):
    """Linear layers, each followed by a norm and ReLU, and a last one that returns the logits.

    Weights and biases have torch's default initialization.

    Args:
        in_channels: channels of the images.
        image_size: height and width of the images.
        num_classes: number of logits.
        norm: builds a normalization layer, `norm(num_features, num_dims)`.
        widths: number of units of each hidden layer.

    Raises:
        UserError: a width is below 1.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: tuple[int, int],
        num_classes: int,
        norm: NormFactory,
        widths: Sequence[int] = (256, 256),
    ) -> None:
        super().__init__()
        if not all(width >= 1 for width in widths):
            raise UserError(f"widths is {list(widths)}; each must be at least 1, for example 256.")
        layers: list[nn.Module] = [nn.Flatten()]
        inputs = in_channels * math.prod(image_size)
        for width in widths:
            layers += [nn.Linear(inputs, width), norm(width, 2), nn.ReLU()]
            inputs = width
        self.layers = nn.Sequential(*layers, nn.Linear(inputs, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, num_classes) for images (N, C, H, W)."""
        return self.layers(images)  # type: ignore[no-any-return]
