"""LeNet for 28x28 grayscale images, with a configurable normalization layer."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from bn_lightning.norms import registry

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
        norm: name in `registry.NORMS` (such as `custom`, `builtin`, `none`), or an
            import path.
        norm_args: other arguments of the norm.
        activation: the activation function phi.
        pooling: `avg` or `max`.

    Raises:
        UserError: the norm is unknown, or does not accept an argument.
    """

    def __init__(
        self,
        norm: str = "custom",
        norm_args: dict[str, Any] | None = None,
        activation: Activation = "sigmoid",
        pooling: Pooling = "avg",
    ) -> None:
        super().__init__()

        def make_norm(num_features: int, num_dims: int) -> nn.Module:
            # The norm may draw random numbers. The other weights must not depend on
            # them.
            with torch.random.fork_rng(devices=()):
                return registry.make(norm, num_features, num_dims, norm_args)

        self.phi = ACTIVATIONS[activation]()
        self.pool = POOLINGS[pooling](kernel_size=2, stride=2)
        self.conv1 = nn.Conv2d(1, 6, kernel_size=5)
        self.norm1 = make_norm(num_features=6, num_dims=4)
        self.conv2 = nn.Conv2d(6, 16, kernel_size=5)
        self.norm2 = make_norm(num_features=16, num_dims=4)
        self.fc1 = nn.Linear(256, 120)
        self.norm3 = make_norm(num_features=120, num_dims=2)
        self.fc2 = nn.Linear(120, 84)
        self.norm4 = make_norm(num_features=84, num_dims=2)
        self.fc3 = nn.Linear(84, 10)
        for layer in (self.conv1, self.conv2, self.fc1, self.fc2, self.fc3):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, 10) for images (N, 1, 28, 28)."""
        x = self.pool(self.phi(self.norm1(self.conv1(images))))  # (N, 6, 12, 12)
        x = self.pool(self.phi(self.norm2(self.conv2(x))))  # (N, 16, 4, 4)
        x = self.phi(self.norm3(self.fc1(x.flatten(1))))  # (N, 120)
        x = self.phi(self.norm4(self.fc2(x)))  # (N, 84)
        return self.fc3(x)  # type: ignore[no-any-return]
