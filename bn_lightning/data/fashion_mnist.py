"""Data module of Fashion-MNIST, which is kept in memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bn_lightning.data import mirrors, pictures, sources
from bn_lightning.data.augmentation import Augmentation, TransformSettings, in_sequence
from bn_lightning.data.splits import stratified_split
from bn_lightning.errors import UserError
from bn_lightning.training.batches import Augment, TensorBatches
from bn_lightning.training.data_module import DataModule

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)  # fmt: skip
MEAN, STD = 0.2860, 0.3530  # of the training pixels in [0, 1]


class Preprocessing(nn.Module):
    """Converts raw images, uint8 (N, 28, 28), to network inputs, float32 (N, 1, H, W).

    Args:
        normalize: whether to standardize pixels with the mean and standard deviation of
            the data set, instead of scaling them to [0, 1].
        resize: height and width to which images are resized; None keeps the size.
    """

    def __init__(self, normalize: bool, resize: int | None = None) -> None:
        super().__init__()
        self.normalize = normalize
        self.resize = resize

    def forward(self, images: Tensor) -> Tensor:
        # uint8 divided by 255 is float32, with the same rounding as in torchvision's
        # ToTensor.
        x = images.unsqueeze(1).div(255)
        if self.resize is not None:
            # Enlarging needs no filter against aliasing, which ONNX computes differently.
            antialias = self.resize < images.size(-1)
            x = F.interpolate(x, (self.resize, self.resize), mode="bilinear", antialias=antialias)
        return x.sub_(MEAN).div_(STD) if self.normalize else x

    def invert(self, inputs: Tensor) -> Tensor:
        """Convert network inputs back to images, uint8 (N, H, W)."""
        x = inputs.float().squeeze(1)
        x = x * STD + MEAN if self.normalize else x
        return (x * 255).round().clamp(0, 255).to(torch.uint8)


class FashionMNIST(DataModule):
    """Fashion-MNIST: 60,000 training and 10,000 test images of clothes, 28x28, in 10 classes.

    Args:
        source: `auto`, `system`, `download`, `sample`, or a folder with the idx files,
            raw or .gz. `auto` tries `root`, the system's copy, the download and the
            packaged sample, in this order.
        root: folder that is searched for the files, and to which they are downloaded.
        mirrors: base URLs to download from.
        batch_size: number of images per batch, over all processes.
        val_images: number of training images held out for validation, scaled down for
            the sample. With 0, the test set is used for validation, as in the article,
            and no checkpoint is selected.
        normalize: standardize pixels with the mean and standard deviation of the
            training set; otherwise they are in [0, 1], as in the article.
        flip: flip half of the training images left to right, at random in each epoch.
        shift: maximum random shift of training images in pixels, along each axis.
        augment: random transforms of training images after flip and shift: a list of
            transforms of torchvision, each `{"name": NAME, "args": {...}}`.
        resize: height and width to which images are resized before the network, for
            networks that need larger images, for example 32; null keeps 28x28.
        seed: seed of the data split and of the order of images; set by
            `--seed_everything`.

    Raises:
        UserError: val_images, shift or resize is out of range, or augment is invalid.
    """

    classes = CLASSES
    in_channels = 1
    num_classes = len(CLASSES)
    machine_settings = ("root", "mirrors")
    source_settings = ("source",)
    fixed_settings = {**DataModule.fixed_settings, "val_images": DataModule.fixed_settings["seed"]}

    def __init__(
        self,
        source: str = "auto",
        root: str = "data",
        mirrors: list[str] = list(mirrors.MIRRORS),  # noqa: B006  # not modified
        batch_size: int = 256,
        val_images: int = 5_000,
        normalize: bool = False,
        flip: bool = False,
        shift: int = 0,
        augment: TransformSettings = None,
        resize: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed)
        if not 0 <= val_images < 60_000:
            raise UserError(
                f"val_images is {val_images}; it must be from 0 to 59,999, for example "
                "--data.val_images 5000."
            )
        if not 0 <= shift <= 27:
            raise UserError(
                f"shift is {shift}; it must be from 0 to 27 pixels, for example --data.shift 1."
            )
        self.source = source
        self.root = Path(root)
        self.mirrors = mirrors
        self.val_images = val_images
        self.flip = flip
        self.shift = shift
        if resize is not None and resize < 1:
            raise UserError(
                f"resize is {resize}; it must be at least 1 pixel, for example --data.resize 32."
            )
        self.image_size = (28, 28) if resize is None else (resize, resize)
        self.preprocessing: Preprocessing = Preprocessing(normalize, resize)
        self.transforms = None
        if augment not in (None, []):
            # Importing torchvision's transforms takes time, and other runs do not need it.
            from bn_lightning.data.transforms import Transforms

            self.transforms = Transforms(augment, (28, 28), may_resize=resize is not None)
        self.images: sources.Images | None = None

    def prepare_data(self) -> None:
        """Find or download the data and verify them.

        Raises:
            DataError: the data are missing, corrupt, or not Fashion-MNIST.
        """
        if self.images is None:
            self.images = sources.load(self.source, self.root, self.mirrors)

    def reuse(self, other: Self) -> None:
        def location(module: Self) -> tuple[Any, ...]:
            return module.source, module.root, tuple(module.mirrors)

        if location(self) == location(other):
            self.images = other.images

    def setup(self, stage: str) -> None:
        """Load the data and split off the validation images."""
        # Lightning calls prepare_data in only one process per machine.
        if self.images is None:
            self.images = sources.load(self.source, self.root, self.mirrors, may_download=False)
        num_train = len(self.images.train_labels)
        num_val = self.val_images
        if num_train < 60_000 and num_val:
            num_val = max(1, num_val * num_train // 60_000)
        labels = self.images.train_labels
        self.train_indices, self.val_indices = stratified_split(labels, num_val, self.seed)

    @property
    def validates_on_test_set(self) -> bool:
        return self.val_images == 0

    def train_dataloader(self) -> TensorBatches:
        images = self._loaded
        return self.train_batches(images.train_images, images.train_labels, self.train_indices)

    def augmentation(self, epoch: int) -> Augment | None:
        num_images = len(self._loaded.train_labels)
        steps: list[Augment] = []
        if self.flip or self.shift:
            steps.append(Augmentation(num_images, self.seed, epoch, self.flip, self.shift))
        if self.transforms is not None:
            steps.append(self.transforms.of_epoch(num_images, self.seed, epoch))
        return in_sequence(steps)

    def val_dataloader(self) -> TensorBatches:
        if self.validates_on_test_set:
            return self.test_dataloader()
        images = self._loaded
        return self.batches(images.train_images, images.train_labels, self.val_indices)

    def test_dataloader(self) -> TensorBatches:
        return self.batches(*self.test_samples())

    def describe(self) -> str:
        return f"Fashion-MNIST from {self._loaded.folder} ({self._loaded.source})"

    def identity(self) -> dict[str, Any]:
        """Return the source of the images and the sha256 of each decompressed file."""
        return {"source": self._loaded.source, "sha256": self._loaded.sha256}

    def test_samples(self) -> tuple[Tensor, Tensor]:
        """Return images, uint8 (N, 28, 28), and labels, int64 (N,)."""
        if self.images is None:
            self.prepare_data()
        return self._loaded.test_images, self._loaded.test_labels

    def draw(self, inputs: Tensor) -> Tensor:
        return self.preprocessing.invert(inputs)

    def read_files(
        self, names: Sequence[str], invert: bool | None
    ) -> tuple[Tensor, list[dict[str, Any]], int]:
        """Read image files and convert them to the style of the data set (see `pictures`)."""
        read, num_unreadable = pictures.read_all(pictures.find(names), invert)
        pixels = torch.stack([picture.pixels for picture in read])
        information = [{"image": str(p.path), "inverted": p.inverted} for p in read]
        return pixels, information, num_unreadable

    @property
    def _loaded(self) -> sources.Images:
        assert self.images is not None, "call setup() before the loaders"
        return self.images
