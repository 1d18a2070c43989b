"""The data module of labelled images, in memory or in files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import StackDataset

from bn_lightning.data import (
    datasets,
    pictures,
    splits,
    torchvision_sets,
)
from bn_lightning.data.augmentation import Augmentation, TransformSettings, in_sequence
from bn_lightning.data.labelled_images import Facts, Images, LabelledImages, as_tensor, mean_and_std
from bn_lightning.data.mirrors import MIRRORS
from bn_lightning.data.preprocessing import Preprocessing
from bn_lightning.errors import UserError
from bn_lightning.training.batches import Augment, ShardedBatches
from bn_lightning.training.data_module import DataModule
from bn_lightning.training.exact_data_loader import ExactDataLoader
from bn_lightning.training.worker_processes import default_workers

MOVED = DataModule.fixed_settings["seed"]


class ImageData(DataModule):
    """Labelled images of any size, number of channels and number of classes.

    Args:
        dataset: `fashion_mnist`, `mnist`, `kmnist`, `cifar10`, `cifar100`, `svhn`, a
            `folder` of pictures, or the import path of a function that returns images,
            labels and class names.
        dataset_args: arguments of that function; for `folder`, its `path`.
        root: folder that is searched for the files, and to which they are downloaded.
        source: origin of Fashion-MNIST: `system`, `download`, `sample`, a folder, or
            `auto`, which tries `root` and then the others, in this order.
        mirrors: base URLs to download Fashion-MNIST from.
        batch_size: number of images per batch, over all processes.
        val_images: number of training images held out for validation, scaled down for
            the sample; by default one twelfth. With 0, the test set is used, as in the
            article, and no checkpoint is selected.
        test_images: number of test images to split off a folder without `test/`; by
            default one twelfth.
        folds: number of folds of a cross-validation.
        fold: index of the fold that is held out for validation, from 0.
        normalize: standardize each channel with the mean and standard deviation of the
            training set; otherwise pixels are in [0, 1], as in the article.
        flip: flip half of the training images left to right, at random in each epoch.
        shift: maximum random shift of training images in pixels, along each axis.
        augment: random transforms of training images after flip and shift: a list of
            transforms of torchvision, each `{"name": NAME, "args": {...}}`.
        resize: height and width to which images are resized; null keeps the size. The
            pictures of a folder are resized and cropped, by default to 64.
        grayscale: read the pictures of a folder in grey instead of RGB.
        skip_broken: leave out pictures of a folder that cannot be read.
        workers: processes that read images from files, on each rank; by default one per
            core, at most 8.
        in_memory: read images from files only once, and hold them in memory.
        seed: seed of the data split and of the order of images; set by
            `--seed_everything`.
        facts: what is known of the images: their size and channels, the classes, and
            mean and standard deviation. A checkpoint contains it. By default, it is
            found in the data.

    Attributes:
        images: the images, after `prepare_data` or `setup`.

    Raises:
        UserError: the data set is unknown, or a setting is out of range.
        DataError: the data set is an import path, and its data cannot be read.
    """

    import_paths = ("dataset",)
    machine_settings = ("root", "mirrors", "workers", "in_memory")
    source_settings = ("source",)
    repetitions = ("fold",)
    found_in_data = ("facts",)
    fixed_settings = {
        **DataModule.fixed_settings,
        **dict.fromkeys(("val_images", "test_images", "folds", "fold"), MOVED),
    }

    def __init__(
        self,
        dataset: str = datasets.FASHION_MNIST,
        dataset_args: dict[str, Any] | None = None,
        source: str = "auto",
        root: str = "data",
        mirrors: list[str] | None = None,
        batch_size: int = 256,
        val_images: int | None = None,
        folds: int | None = None,
        fold: int | None = None,
        normalize: bool = False,
        flip: bool = False,
        shift: int = 0,
        augment: TransformSettings = None,
        resize: int | None = None,
        seed: int = 0,
        facts: dict[str, Any] | None = None,
        test_images: int | None = None,
        grayscale: bool = False,
        skip_broken: bool = False,
        workers: int | None = None,
        in_memory: bool = False,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed)
        if resize is not None and resize < 1:
            raise UserError(
                f"resize is {resize}; it must be at least 1 pixel, for example --data.resize 32."
            )
        is_folder = dataset == datasets.FOLDER
        self.dataset = datasets.DataSet(
            dataset,
            dict(dataset_args or {}),
            Path(root),
            source,
            # The default may be written out.
            None if mirrors is None or mirrors == list(MIRRORS) else tuple(mirrors),
            resize if is_folder else None,
            grayscale,
            test_images,
            skip_broken,
            in_memory,
            # The seed determines the test set of a folder.
            seed if is_folder else 0,
            workers,
        )
        self.split = splits.Split(val_images, folds, fold)
        self.normalize = normalize
        self.flip = flip
        self.shift = shift
        # Pictures of a folder are resized when they are read.
        self.resize = None if is_folder else resize
        self.images: LabelledImages | None = None
        known = self.dataset.known_facts()
        if facts is not None:
            known = Facts(**facts)
        if known is not None:
            self._set_facts(known)
        else:
            # The network depends on what only the data tell.
            self.prepare_data()
        longest = max(self.facts.image_size) - 1
        if not 0 <= shift <= longest:
            raise UserError(
                f"shift is {shift}; it must be from 0 to {longest} pixels, for example "
                "--data.shift 1."
            )
        self.transforms = None
        if augment not in (None, []):
            # Importing torchvision's transforms takes time, and other runs do not need it.
            from bn_lightning.data.transforms import Transforms

            channels = () if self.in_channels == 1 else (self.in_channels,)
            shape = *channels, *self.facts.image_size
            self.transforms = Transforms(augment, shape, may_resize=self.resize is not None)

    def _set_facts(self, facts: Facts) -> None:
        self.facts = facts
        self.classes = facts.classes or [str(label) for label in range(facts.num_classes)]
        self.num_classes, self.in_channels = facts.num_classes, facts.in_channels
        size = facts.image_size
        self.image_size = size if self.resize is None else (self.resize, self.resize)
        arguments = self.normalize, facts.mean, facts.std, self.resize
        self.preprocessing: Preprocessing = Preprocessing(*arguments)
        self.hparams["facts"] = asdict(facts)

    def prepare_data(self) -> None:
        """Find or download the data and verify them.

        Raises:
            DataError: the data are missing, corrupt, or not the expected ones.
            UserError: the images do not fit those of the checkpoint, or there are too
                few.
        """
        if self.images is None:
            self._use(self.dataset.read(self.num_workers))

    def _use(self, images: LabelledImages) -> None:
        found = images.facts()
        known = getattr(self, "facts", found)
        known.refuse_other(found, self.dataset.name)
        if not known.mean:
            known = found
        # For images in files, this takes a pass over all of them.
        is_cheap = isinstance(images.train_images, Tensor)
        if not known.mean and (is_cheap or self.normalize):
            mean, std = mean_and_std(images.train_images, self.num_workers)
            known = replace(found, mean=mean, std=std)
        if images.val is None:
            self.split.refuse_too_few(len(images.train_labels), images.whole)
        elif self.split != splits.Split():
            raise UserError(
                f"The folder {str(images.folder)!r} has validation images of its own, in val/. "
                "Remove --data.val_images, --data.folds and --data.fold."
            )
        self.images = images
        self._set_facts(known)

    def reuse(self, other: Self) -> None:
        if self.images is None and other.images and self.dataset == other.dataset:
            self._use(other.images)

    def setup(self, stage: str) -> None:
        """Load the data and split off the validation images."""
        # Lightning calls prepare_data in only one process per machine.
        if self.images is None:
            self._use(self.dataset.read(self.num_workers, may_download=False))
        images = self._loaded
        if images.val is None:
            self.train_indices, self.val_indices = self.split.indices(
                images.train_labels, images.whole, self.seed
            )
        else:
            self.train_indices = torch.arange(len(images.train_labels))

    # What the framework asks

    @property
    def validates_on_test_set(self) -> bool:
        return self.split.val_images == 0

    @property
    def has_validation_set(self) -> bool:
        return self._loaded.val is not None

    @property
    def num_workers(self) -> int:
        """The number of processes that read images for this process."""
        if self.dataset.workers is not None:
            return self.dataset.workers
        return default_workers(self.trainer.num_devices if self.trainer else 1)

    def _batches(
        self, images: Images, labels: Tensor, indices: Tensor | None = None, shuffle: bool = False
    ) -> ShardedBatches:
        """Return a loader of images; with `shuffle`, for training on those at `indices`."""
        if isinstance(images, Tensor):
            if shuffle and indices is not None:
                return self.train_batches(images, labels, indices)
            return self.batches(images, labels, indices)
        return ExactDataLoader(
            StackDataset(images, labels),  # type: ignore[arg-type]
            self.batch_size,
            shuffle,
            self.num_workers,
            indices=indices,
            seed=self.seed,
            trainer=self.trainer,
            augmentation=self.augmentation,
            preprocessing=self.preprocessing,
        )

    def train_dataloader(self) -> ShardedBatches:
        images = self._loaded
        return self._batches(
            images.train_images, images.train_labels, self.train_indices, shuffle=True
        )

    def augmentation(self, epoch: int) -> Augment | None:
        num_images = len(self._loaded.train_labels)
        steps: list[Augment] = []
        if self.flip or self.shift:
            steps.append(Augmentation(num_images, self.seed, epoch, self.flip, self.shift))
        if self.transforms is not None:
            steps.append(self.transforms.of_epoch(num_images, self.seed, epoch))
        return in_sequence(steps)

    def val_dataloader(self) -> ShardedBatches:
        images = self._loaded
        if self.validates_on_test_set:
            return self.test_dataloader()
        if images.val is not None:
            return self._batches(*images.val)
        return self._batches(images.train_images, images.train_labels, self.val_indices)

    def test_dataloader(self) -> ShardedBatches:
        self.prepare_data()
        return self._batches(self._loaded.test_images, self._loaded.test_labels)

    def predict_dataloader(self) -> ShardedBatches:
        return self.test_dataloader()

    def describe(self) -> str:
        images = self._loaded
        split = self.split
        part = "" if split.folds is None else f", fold {split.fold} of {split.folds} held out"
        if self.dataset.name == datasets.FASHION_MNIST:
            return f"Fashion-MNIST from {images.folder} ({images.source}){part}"
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.dataset.args.items())
        folder = f" from {images.folder}" if self.dataset.name in torchvision_sets.SETS else ""
        return (
            f"{self.dataset.name}{f'({arguments})' if arguments else ''}{folder}: "
            f"{len(images.train_labels):,} training and {len(images.test_labels):,} test images, "
            f"{self.facts.shape}{part}"
        )

    def notes(self) -> list[str]:
        images = self._loaded
        if self.dataset.name != datasets.FOLDER:
            return []
        notes = list(images.notes)
        if images.val is None and self.split.folds is None and not self.validates_on_test_set:
            count = len(images.train_labels)
            held_out = self.split.num_held_out(count, count)
            notes.insert(0, f"{held_out:,} of the training images are held out for validation")
        return notes

    def identity(self) -> dict[str, Any]:
        """Return the source of the images, and the sha256 of their content.

        For a folder, this is the checksum of the list of files, and the number of
        pictures in each part is returned too.
        """
        images = self._loaded
        identity: dict[str, Any] = {"source": images.source, "sha256": images.sha256}
        if self.dataset.name == datasets.FOLDER:
            identity["images"] = {
                "train": len(images.train_labels),
                "val": 0 if images.val is None else len(images.val[1]),
                "test": len(images.test_labels),
            }
        return identity

    @classmethod
    def identity_in(cls, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        # Version 0.1.0 had only this data set.
        return super().identity_in(checkpoint) or dict(checkpoint.get("FashionMNIST") or {})

    def refuse_other_data(self, checkpoint: Mapping[str, Any]) -> None:
        super().refuse_other_data(checkpoint)
        if self._loaded.splits_test and self.identity_in(checkpoint) != self.identity():
            raise UserError(
                f"The files in {str(self._loaded.folder)!r} are not those of the training. The "
                "test set is split off them, so it may now contain training images.\n"
                "Use the folder as it was, or put images that were not used for training in test/, "
                "and the others in train/."
            )

    def class_counts(self) -> Tensor:
        labels = self._loaded.train_labels[self.train_indices]
        return labels.bincount(minlength=self.num_classes)

    def test_samples(self) -> tuple[Tensor, Tensor]:
        """Return images, uint8 (N, H, W) or (N, C, H, W), and labels, int64 (N,)."""
        self.prepare_data()
        images = self._loaded
        return as_tensor(images.test_images, self.num_workers), images.test_labels

    def example_input(self) -> Tensor:
        # The other test images are not read.
        self.prepare_data()
        images = self._loaded.test_images
        return torch.stack([images[index] for index in range(min(7, len(images)))])

    def test_names(self) -> Sequence[int | str]:
        images = self._loaded
        return images.test_names or range(len(images.test_labels))

    def draw(self, inputs: Tensor) -> Tensor | None:
        return self.preprocessing.invert(inputs)

    def read_files(
        self, names: Sequence[str], invert: bool | None
    ) -> tuple[Tensor, list[dict[str, Any]], int]:
        """Read image files.

        For Fashion-MNIST, they are converted to the style of the data set (see
        `pictures.read`). For other data sets, see `pictures.read_as`.
        """
        has_style = self.dataset.name == datasets.FASHION_MNIST
        read: Callable[[Path], pictures.Picture]
        if has_style:
            read = partial(pictures.read, invert=invert)
        else:
            height, width = self.facts.image_size
            size = width, height
            read = partial(
                pictures.read_as, size=size, channels=self.in_channels, invert=bool(invert)
            )
        found, num_unreadable = pictures.read_all(pictures.find(names), read)
        pixels = torch.stack([picture.pixels for picture in found])
        information: list[dict[str, Any]] = [
            {"image": str(p.path)} | ({"inverted": p.inverted} if has_style else {}) for p in found
        ]
        return pixels, information, num_unreadable

    @property
    def _loaded(self) -> LabelledImages:
        assert self.images is not None, "call setup() before the loaders"
        return self.images
