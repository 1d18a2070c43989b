"""LeNet, with a configurable normalization layer."""

from typing import Any, Literal

from torch import Tensor, nn

from bn_lightning import lookup
from bn_lightning.errors import UserError
from bn_lightning.norms import registry
from bn_lightning.norms.registry import NormFactory

Activation = Literal["sigmoid", "relu", "tanh", "gelu", "silu"]
Pooling = Literal["avg", "max"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}
POOLINGS: dict[str, type[nn.Module]] = {"avg": nn.AvgPool2d, "max": nn.MaxPool2d}


class LeNet(nn.Module):
    """The tutorial's version of LeNet-5 (LeCun et al. 1998), with a norm before each activation.

    There are four blocks h = phi(norm(W x + b)): two convolutions, each followed by 2x2
    pooling, and two linear layers. A fifth layer returns the logits. With batch
    normalization, the network has 44,878 parameters. Weights are initialized
    Xavier-uniform (Glorot and Bengio 2010, equation 16). Biases have torch's default
    initialization.

    Args:
        norm: name in `registry.NORMS` (such as `custom`, `builtin`, `none`), an import
            path, a class, or a function that builds a layer, `norm(num_features,
            num_dims)`.
        norm_args: other arguments of a norm that is given by its name or as a class.
        activation: the activation function phi.
        pooling: `avg` or `max`.
        in_channels: channels of the images.
        image_size: height and width of the images, at least 16 each.
        num_classes: number of logits.

    Raises:
        UserError: the norm, the activation or the pooling is unknown; the norm does not
            accept an argument; or the images are too small.
    """

    def __init__(
        self,
        norm: str | NormFactory = "custom",
        norm_args: dict[str, Any] | None = None,
        activation: Activation = "sigmoid",
        pooling: Pooling = "avg",
        in_channels: int = 1,
        image_size: tuple[int, int] = (28, 28),
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        if min(image_size) < 16:
            height, width = image_size
            raise UserError(
                f"LeNet needs images of at least 16x16 pixels, got {height}x{width}. Enlarge them, "
                "for example with --data.resize 28."
            )
        make_norm = registry.factory(norm, norm_args)
        self.phi = lookup.find_name(activation, "activation", ACTIVATIONS)()
        self.pool = lookup.find_name(pooling, "pooling", POOLINGS)(kernel_size=2, stride=2)
        self.conv1 = nn.Conv2d(in_channels, 6, kernel_size=5)
        self.norm1 = make_norm(6, 4)
        self.conv2 = nn.Conv2d(6, 16, kernel_size=5)
        self.norm2 = make_norm(16, 4)
        # Each convolution takes off 4 rows, and each pooling halves them.
        height, width = (((size - 4) // 2 - 4) // 2 for size in image_size)
        self.fc1 = nn.Linear(16 * height * width, 120)
        self.norm3 = make_norm(120, 2)
        self.fc2 = nn.Linear(120, 84)
        self.norm4 = make_norm(84, 2)
        self.fc3 = nn.Linear(84, num_classes)
        for layer in (self.conv1, self.conv2, self.fc1, self.fc2, self.fc3):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, num_classes) for images (N, C, H, W). Comments are for 28x28."""
        x = self.pool(self.phi(self.norm1(self.conv1(images))))  # (N, 6, 12, 12)
        x = self.pool(self.phi(self.norm2(self.conv2(x))))  # (N, 16, 4, 4)
        x = self.phi(self.norm3(self.fc1(x.flatten(1))))  # (N, 120)
        x = self.phi(self.norm4(self.fc2(x)))  # (N, 84)
        return self.fc3(x)  # type: ignore[no-any-return]
