"""The data. Change `load` to return your own images."""

from typing import Any

from bn_lightning import ImageData


def load() -> tuple[Any, ...]:
    """Return training images and labels, test images and labels, and the names of the classes.

    Images are uint8, (N, height, width) or (N, channels, height, width). Labels are
    integers from 0. These are 7,000 images of Fashion-MNIST, which bn_lightning contains.
    """
    data = ImageData("fashion_mnist", source="sample")
    data.prepare_data()
    images: Any = data.images
    train = images.train_images, images.train_labels
    test = images.test_images, images.test_labels
    return *train, *test, images.classes
