"""Fashion-MNIST as a LightningDataModule: split, order and batches, from tensors in memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn import functional as F

from bn_lightning.data import sources
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


class Augmentation:
    """Mirrors and shifts of one epoch, for each image a function of (seed, epoch, image) and of nothing else.

    So they are the same in whatever batch, on whichever process, and in whichever part of an interrupted run an image
    is shown.

    Args:
        num_images: N, of the whole data set.
        flip: whether half of the images are mirrored, left to right.
        shift: the most pixels that an image is moved along each axis; what comes in is black.
    """

    def __init__(self, num_images: int, seed: int, epoch: int, flip: bool, shift: int) -> None:
        random = np.random.default_rng((seed, epoch, 1))  # epoch_order has (seed, epoch)
        self.shift = shift
        self.flips = torch.from_numpy((random.random(num_images) < 0.5) & flip)
        self.shifts = torch.from_numpy(random.integers(-shift, shift, (num_images, 2, 1), endpoint=True))

    def __call__(self, images: Tensor, indices: Tensor) -> Tensor:
        """The images (B, 28, 28), those of the data set at `indices` (B,), mirrored and moved."""
        height, width = images.shape[1:]
        flips, shifts = self.flips[indices.cpu()].to(images.device), self.shifts[indices.cpu()].to(images.device)
        padded = F.pad(images, [self.shift] * 4)
        rows = torch.arange(height, device=images.device) + self.shift - shifts[:, 0]  # (B, 28): which to take
        columns = torch.arange(width, device=images.device) + self.shift - shifts[:, 1]
        columns = torch.where(flips[:, None], padded.shape[2] - 1 - columns, columns)
        places = rows[:, :, None] * padded.shape[2] + columns[:, None, :]
        return padded.flatten(1).gather(1, places.flatten(1)).view_as(images)


@dataclass(frozen=True)
class Epoch:
    """What one epoch shows: indices of images, int64 (M,); the number of the batch to begin with; what changes them."""

    order: Tensor
    first: int = 0
    augmentation: Augmentation | None = None


class Batches:
    """Batches by indexing tensors in memory: an iterable with a length, in the place of a torch DataLoader.

    With several processes each takes its own slice of every batch, and all slices together are the batch.

    Args:
        images: uint8 (N, 28, 28), on the device where they are wanted.
        labels: int64 (N,), on the same device.
        indices: int64 (M,), the images that take part.
        batch_size: images of one batch over all processes; the last batch may be smaller.
        epoch: asked for when the first batch is taken; None shows the images in the order of `indices`.
        rank, world_size: which slice to take, of how many.
        mean, std: subtracted from the pixels in [0, 1], and divided by.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        indices: Tensor,
        batch_size: int,
        epoch: Callable[[], Epoch] | None = None,
        rank: int = 0,
        world_size: int = 1,
        mean: float = 0.0,
        std: float = 1.0,
    ) -> None:
        self.images = images
        self.labels = labels
        self.indices = indices
        self.batch_size = batch_size
        self.epoch = epoch
        self.rank = rank
        self.world_size = world_size
        self.mean = mean
        self.std = std

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def size_of(self, batch_idx: int) -> int:
        """The images of the batch with that number, over all processes."""
        return min(self.batch_size, len(self.indices) - batch_idx * self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        # Lightning calls iter() more than once before it takes a batch; the body runs when the first one is taken.
        epoch = self.epoch() if self.epoch else Epoch(self.indices)
        batches = epoch.order.to(self.images.device).split(self.batch_size)  # type: ignore[no-untyped-call]
        for batch in batches[epoch.first :]:
            yield self.take(batch.tensor_split(self.world_size)[self.rank], epoch.augmentation)

    def take(self, indices: Tensor, augmentation: Augmentation | None = None) -> Batch:
        """Images (B, 1, 28, 28) float32 and labels (B,) int64 at these indices of the data set."""
        # index_select takes a quarter of the time of images[indices]; uint8 / 255 is float32, rounded as ToTensor does.
        images = self.images.index_select(0, indices)
        if augmentation is not None:
            images = augmentation(images, indices)
        images = images.unsqueeze(1).div(255)
        if (self.mean, self.std) != (0.0, 1.0):
            images.sub_(self.mean).div_(self.std)
        return images, self.labels.index_select(0, indices)

    # Lightning takes a loader with these two for one that can go on in the middle of an epoch. This one asks for the
    # epoch's first batch: a state of its own would be lost when the number of steps is asked for before it is restored.
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


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
        flip: mirror half of the training images, others in each epoch.
        shift: move each training image by up to so many pixels along each axis, anew in each epoch.
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
        flip: bool = False,
        shift: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # the logger gets them with the results, at the end of the run
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; it must be at least 1: --data.batch_size 256")
        if not 0 <= val_images < 60_000:
            raise UserError(f"val_images is {val_images}; it must be from 0 to 59,999: --data.val_images 5000")
        if not 0 <= shift <= 27:
            raise UserError(f"shift is {shift}; it must be from 0 to 27 pixels: --data.shift 1")
        if seed < 0:
            raise UserError(f"The seed is {seed}; it must not be negative: --seed_everything 0")
        self.source = source
        self.root = Path(root)
        self.mirrors = mirrors
        self.batch_size = batch_size
        self.val_images = val_images
        self.normalize = normalize
        self.flip = flip
        self.shift = shift
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

    def train_order(self, epoch: int) -> Tensor:
        """The images of an epoch in the order in which they are shown: indices of the training images, int64 (M,)."""
        if getattr(self.trainer, "overfit_batches", 0):
            return self.train_indices  # the same few batches again and again
        return self.train_indices[epoch_order(len(self.train_indices), self.seed, epoch)]

    def train_dataloader(self) -> Batches:
        num_images, processes = len(self.train_indices), self.trainer.world_size if self.trainer else 1
        if (num_images % self.batch_size or self.batch_size) < processes:
            raise UserError(
                f"The last batch of an epoch has fewer images than there are processes ({processes}): {num_images:,} "
                f"training images in batches of {self.batch_size}.\n"
                "Another size of the batch or number of validation images: --data.batch_size 256 --data.val_images 5000"
            )

        def epoch() -> Epoch:
            number = self.trainer.current_epoch if self.trainer else 0
            first = 0
            if self.trainer and self.trainer.fit_loop.restarting:
                first = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready  # behind us before we stopped
            augmentation = None
            if self.flip or self.shift:
                num_images = len(self._loaded.train_labels)
                augmentation = Augmentation(num_images, self.seed, number, self.flip, self.shift)
            return Epoch(self.train_order(number), first, augmentation)

        return self._batches(self._loaded.train_images, self._loaded.train_labels, self.train_indices, epoch)

    def val_dataloader(self) -> Batches:
        if self.validates_on_test_set:
            return self.test_dataloader()
        return self._batches(self._loaded.train_images, self._loaded.train_labels, self.val_indices)

    def test_dataloader(self) -> Batches:
        labels = self._loaded.test_labels
        return self._batches(self._loaded.test_images, labels, torch.arange(len(labels)))

    def predict_dataloader(self) -> Batches:
        return self.test_dataloader()

    def batches_of(self, images: Tensor) -> Batches:
        """Other images, uint8 (N, 28, 28), as a network trained with this module wants them; all labels are 0."""
        return self._batches(images, torch.zeros(len(images), dtype=torch.long), torch.arange(len(images)))

    def state_dict(self) -> dict[str, Any]:
        """What identifies the data of a run; its position is the trainer's own count of batches."""
        return {"source": self._loaded.source, "sha256": self._loaded.sha256}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to go on training with other data.

        Raises:
            UserError: the checkpoint was trained on other images.
        """
        same = state_dict["sha256"] == self._loaded.sha256
        if not same and (self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING):
            raise UserError(
                f"The checkpoint was trained on other data (source {state_dict['source']}) than there are now (source "
                f"{self._loaded.source}, in {self._loaded.place}): a run cannot go on with other images.\n"
                f"Give it the same: --data.source {state_dict['source']}, or begin a new run, without the checkpoint."
            )

    @property
    def _loaded(self) -> sources.Images:
        assert self.images is not None, "setup() comes before the loaders"
        return self.images

    def _batches(
        self, images: Tensor, labels: Tensor, indices: Tensor, epoch: Callable[[], Epoch] | None = None
    ) -> Batches:
        trainer = self.trainer
        device = trainer.strategy.root_device if trainer else torch.device("cpu")
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        images, labels = images.to(device), labels.to(device)
        mean, std = (MEAN, STD) if self.normalize else (0.0, 1.0)
        return Batches(images, labels, indices, self.batch_size, epoch, rank, world_size, mean, std)
