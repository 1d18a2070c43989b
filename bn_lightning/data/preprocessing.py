"""Preprocessing of images: raw pixels to the input of the network, and back."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Preprocessing(nn.Module):
    """Converts raw images, uint8 (N, H, W) or (N, C, H, W), to float32 (N, C, H, W).

    Args:
        normalize: whether to standardize each channel, instead of scaling pixels to [0,
            1].
        mean, std: mean and standard deviation of the pixels in [0, 1], per channel.
        resize: height and width to which images are resized; None keeps the size.
    """

    def __init__(
        self,
        normalize: bool,
        mean: Sequence[float],
        std: Sequence[float],
        resize: int | None = None,
    ) -> None:
        super().__init__()
        self.normalize = normalize
        self.mean, self.std = tuple(mean), tuple(std)
        self.resize = resize

    def forward(self, images: Tensor) -> Tensor:
        # uint8 divided by 255 is float32, with the same rounding as in torchvision's
        # ToTensor.
        x = (images if images.dim() == 4 else images.unsqueeze(1)).div(255)
        if self.resize is not None:
            # Enlarging needs no filter against aliasing, which ONNX computes differently.
            antialias = self.resize < max(images.shape[-2:])
            x = F.interpolate(x, (self.resize, self.resize), mode="bilinear", antialias=antialias)
        if not self.normalize:
            return x
        if len(self.mean) == 1:
            return x.sub_(self.mean[0]).div_(self.std[0])
        # Tensors of mean and std would have to be copied to the device of the images.
        channels = zip(x.unbind(1), self.mean, self.std, strict=True)
        return torch.stack([channel.sub(mean).div_(std) for channel, mean, std in channels], 1)

    def invert(self, inputs: Tensor) -> Tensor | None:
        """Convert network inputs back to images, uint8 (N, H, W) or (N, H, W, 3).

        Return None for other numbers of channels than one and three.
        """
        if inputs.size(1) not in (1, 3):
            return None
        x = inputs.float()
        if self.normalize:
            mean, std = (x.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
            x = x * std + mean
        x = (x * 255).round().clamp(0, 255).to(torch.uint8)
        return x.squeeze(1) if x.size(1) == 1 else x.permute(0, 2, 3, 1)
