"""Fashion-MNIST as a LightningDataModule: split, order and batches, from tensors in memory."""

from collections.abc import Callable, Iterator
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from bn_lightning import sources
from bn_lightning.errors import UserError

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
MEAN, STD = 0.2860, 0.3530  # of the training pixels in [0, 1]

Batch = tuple[Tensor, Tensor]


def epoch_order(num_images: int, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch shows its images: int64 (num_images,), a function of its arguments alone."""
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(num_images))


def stratified_split(labels: Tensor, num_held_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices (kept, held out), each ascending, both with the classes in the proportion of `labels`."""
    shuffled = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    # Evenly spaced positions along the images sorted by class take of each class its share.
    positions = (torch.arange(num_held_out) * len(labels)) // max(num_held_out, 1)
    is_held_out = torch.zeros(len(labels), dtype=torch.bool)
    is_held_out[by_class[positions]] = True
    return (~is_held_out).nonzero().flatten(), is_held_out.nonzero().flatten()


class Batches:
    """Batches by indexing tensors in memory: an iterable with a length, in the place of a torch DataLoader.

    With several processes each takes its own slice of every batch, and all slices together are the batch.

    Args:
        images: uint8 (N, 28, 28), on the device where they are wanted.
        labels: int64 (N,), on the same device.
        batch_size: images of one batch over all processes; the last batch may be smaller.
        order: gives the order of an epoch, int64 (N,), when its first batch is taken; None keeps the images' own.
        rank, world_size: which slice to take, of how many.
        mean, std: subtracted from the pixels in [0, 1], and divided by.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        order: Callable[[], Tensor] | None = None,
        rank: int = 0,
        world_size: int = 1,
        mean: float = 0.0,
        std: float = 1.0,
    ) -> None:
        self.images = images
        self.labels = labels
        self.batch_size = batch_size
        self.order = order
        self.rank = rank
        self.world_size = world_size
        self.mean = mean
        self.std = std

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        # Lightning calls iter() more than once before it takes a batch; the body runs when the first one is taken.
        order = self.order() if self.order else torch.arange(len(self.labels))
        for batch in order.to(self.images.device).split(self.batch_size):  # type: ignore[no-untyped-call]
            yield self[batch.tensor_split(self.world_size)[self.rank]]

    def __getitem__(self, indices: Tensor) -> Batch:
        """Images (B, 1, 28, 28) float32 and labels (B,) int64 at these indices."""
        # index_select takes a quarter of the time of images[indices]; uint8 / 255 is float32, rounded as ToTensor does.
        images = self.images.index_select(0, indices).unsqueeze(1).div(255)
        if (self.mean, self.std) != (0.0, 1.0):
            images.sub_(self.mean).div_(self.std)
        return images, self.labels.index_select(0, indices)


class FashionMNIST(pl.LightningDataModule):
    """Fashion-MNIST: 28x28 greyscale pictures of clothes in 10 classes, 60,000 to train on and 10,000 to test.

    Args:
        source: `auto`, `system`, `download`, `sample`, or a folder that holds the idx files, raw or .gz. `auto` takes
            the first that can be had: what `root` holds, the system's copy, the download, the packaged sample.
        root: the folder that keeps downloads.
        mirrors: addresses to download from.
        batch_size: images of one batch, over all processes together.
        val_images: how many of the 60,000 training images are held out for validation, the same share of each class,
            chosen by the seed (of the packaged sample, which is smaller, the same proportion). 0 trains on all of them
            and validates on the test set, as the article does; then no checkpoint is selected.
        normalize: standardize pixels with the data set's mean and deviation; the article leaves them in [0, 1].
        seed: of the split and of each epoch's order. On the command line it is --seed_everything.
    """

    classes = CLASSES

    def __init__(
        self,
        source: str = "auto",
        root: str = "data",
        mirrors: list[str] = list(sources.MIRRORS),  # noqa: B006  # never changed, and shown as it is by --help
        batch_size: int = 256,
        val_images: int = 5_000,
        normalize: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # the logger gets them with the results, at the end of the run
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; it must be at least 1: --data.batch_size 256")
        if not 0 <= val_images < 60_000:
            raise UserError(f"val_images is {val_images}; it must be from 0 to 59,999: --data.val_images 5000")
        if seed < 0:
            raise UserError(f"The seed is {seed}; it must not be negative: --seed_everything 0")
        self.source = source
        self.root = Path(root)
        self.mirrors = mirrors
        self.batch_size = batch_size
        self.val_images = val_images
        self.normalize = normalize
        self.seed = seed
        self.images: sources.Images | None = None

    def prepare_data(self) -> None:
        """Find or download the data, and check them.

        Raises:
            DataError: missing, broken or wrong data.
        """
        if self.images is None:
            self.images = sources.load(self.source, self.root, self.mirrors)

    def setup(self, stage: str) -> None:
        """Read the data and split off the validation images."""
        if self.images is None:  # a process beside the one that prepared the data
            self.images = sources.load(self.source, self.root, self.mirrors, may_download=False)
        num_train = len(self.images.train_labels)
        num_val = self.val_images
        if num_train < 60_000 and num_val:
            num_val = max(1, num_val * num_train // 60_000)
        self.train_indices, self.val_indices = stratified_split(self.images.train_labels, num_val, self.seed)

    @property
    def validates_on_test_set(self) -> bool:
        """Whether there are no images for validation but those of the test set."""
        return self.val_images == 0

    def train_dataloader(self) -> Batches:
        images, labels = self._loaded.train_images, self._loaded.train_labels
        indices = self.train_indices

        def order() -> Tensor:
            if getattr(self.trainer, "overfit_batches", 0):
                return torch.arange(len(indices))  # the same few batches again and again
            return epoch_order(len(indices), self.seed, self.trainer.current_epoch if self.trainer else 0)

        return self._batches(images[indices], labels[indices], order)

    def val_dataloader(self) -> Batches:
        if self.validates_on_test_set:
            return self.test_dataloader()
        images, labels = self._loaded.train_images, self._loaded.train_labels
        return self._batches(images[self.val_indices], labels[self.val_indices])

    def test_dataloader(self) -> Batches:
        return self._batches(self._loaded.test_images, self._loaded.test_labels)

    def predict_dataloader(self) -> Batches:
        return self.test_dataloader()

    @property
    def _loaded(self) -> sources.Images:
        assert self.images is not None, "setup() comes before the loaders"
        return self.images

    def _batches(self, images: Tensor, labels: Tensor, order: Callable[[], Tensor] | None = None) -> Batches:
        trainer = self.trainer
        device = trainer.strategy.root_device if trainer else torch.device("cpu")
        mean, std = (MEAN, STD) if self.normalize else (0.0, 1.0)
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        return Batches(images.to(device), labels.to(device), self.batch_size, order, rank, world_size, mean, std)
