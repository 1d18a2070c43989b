"""The data module of Fashion-MNIST."""

from typing import Any

from bn_lightning.data.image_data import ImageData
from bn_lightning.data.sources import CLASSES as CLASSES
from bn_lightning.data.sources import MEAN as MEAN
from bn_lightning.data.sources import STD as STD


class FashionMNIST(ImageData):
    """Fashion-MNIST: 60,000 training and 10,000 test images of clothes, 28x28, in 10 classes.

    Args:
        source, root, settings: see `ImageData`.
    """

    def __init__(self, source: str = "auto", root: str = "data", **settings: Any) -> None:
        super().__init__(source=source, root=root, **settings)
