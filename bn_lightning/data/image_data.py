"""The data module of labelled images that fit in memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from bn_lightning.data import datasets, pictures, sources, splits, torchvision_sets
from bn_lightning.data.augmentation import Augmentation, TransformSettings, in_sequence
from bn_lightning.data.labelled_images import Facts, LabelledImages, mean_and_std
from bn_lightning.data.mirrors import MIRRORS
from bn_lightning.data.preprocessing import Preprocessing
from bn_lightning.errors import UserError
from bn_lightning.training.batches import Augment, TensorBatches
from bn_lightning.training.data_module import DataModule

MOVED = DataModule.fixed_settings["seed"]


class ImageData(DataModule):
    """Labelled images in memory, of any size, number of channels and number of classes.

    Args:
        dataset: `fashion_mnist`, `mnist`, `kmnist`, `cifar10`, `cifar100`, `svhn`, or
            the import path of a function that returns images, labels and class names.
        dataset_args: arguments of that function.
        root: folder that is searched for the files, and to which they are downloaded.
        source: origin of Fashion-MNIST: `system`, `download`, `sample`, a folder, or
            `auto`, which tries `root` and then the others, in this order.
        mirrors: base URLs to download Fashion-MNIST from.
        batch_size: number of images per batch, over all processes.
        val_images: number of training images held out for validation, scaled down for
            the sample; by default one twelfth. With 0, the test set is used, as in the
            article, and no checkpoint is selected.
        folds: number of folds of a cross-validation.
        fold: index of the fold that is held out for validation, from 0.
        normalize: standardize each channel with the mean and standard deviation of the
            training set; otherwise pixels are in [0, 1], as in the article.
        flip: flip half of the training images left to right, at random in each epoch.
        shift: maximum random shift of training images in pixels, along each axis.
        augment: random transforms of training images after flip and shift: a list of
            transforms of torchvision, each `{"name": NAME, "args": {...}}`.
        resize: height and width to which images are resized before the network, for
            networks that need larger images, for example 32; null keeps the size.
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
    machine_settings = ("root", "mirrors")
    source_settings = ("source",)
    repetitions = ("fold",)
    found_in_data = ("facts",)
    fixed_settings = {
        **DataModule.fixed_settings,
        **dict.fromkeys(("val_images", "folds", "fold"), MOVED),
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
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed)
        self.dataset = dataset
        self.dataset_args = dict(dataset_args or {})
        self.source = source
        self.root = Path(root)
        self.mirrors = list(mirrors or MIRRORS)
        self.split = splits.Split(val_images, folds, fold)
        self.normalize = normalize
        self.flip = flip
        self.shift = shift
        self.resize = resize
        self.images: LabelledImages | None = None
        self._refuse_wrong_settings()
        known = datasets.facts_of(dataset, self.dataset_args)
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
            self.transforms = Transforms(augment, shape, may_resize=resize is not None)

    def _refuse_wrong_settings(self) -> None:
        if self.dataset != datasets.FASHION_MNIST:
            is_given = {"source": self.source != "auto", "mirrors": self.mirrors != list(MIRRORS)}
            for name, default in {"source": "auto", "mirrors": "null"}.items():
                if not is_given[name]:
                    continue
                raise UserError(
                    f"--data.{name} is for the data set {datasets.FASHION_MNIST!r} only, but the "
                    f"data set is {self.dataset!r}. Remove it; if a checkpoint or a file sets it, "
                    f"use --data.{name} {default}."
                )
        if self.resize is not None and self.resize < 1:
            raise UserError(
                f"resize is {self.resize}; it must be at least 1 pixel, for example "
                "--data.resize 32."
            )

    def _set_facts(self, facts: Facts) -> None:
        self.facts = facts
        self.classes = facts.classes or [str(label) for label in range(facts.num_classes)]
        self.num_classes, self.in_channels = facts.num_classes, facts.in_channels
        size = facts.image_size
        self.image_size = size if self.resize is None else (self.resize, self.resize)
        arguments = self.normalize, facts.mean, facts.std, self.resize
        self.preprocessing: Preprocessing = Preprocessing(*arguments)
        self.hparams["facts"] = asdict(facts)

    # Reading

    def prepare_data(self) -> None:
        """Find or download the data and verify them.

        Raises:
            DataError: the data are missing, corrupt, or not the expected ones.
            UserError: the images do not fit those of the checkpoint, or there are too
                few.
        """
        if self.images is None:
            self._use(self._read())

    def _read(self, may_download: bool = True) -> LabelledImages:
        if self.dataset == datasets.FASHION_MNIST:
            return sources.load(self.source, self.root, self.mirrors, may_download)
        if self.dataset in torchvision_sets.SETS:
            return torchvision_sets.load(self.dataset, self.root)
        return datasets.call(self.dataset, self.dataset_args, self.root)

    def _use(self, images: LabelledImages) -> None:
        found = images.facts()
        known = getattr(self, "facts", found)
        if known.shape != found.shape:
            raise UserError(
                f"The images of the data set {self.dataset!r} have {found.shape}, but the network "
                f"is for {known.shape}.\nUse the data with which the network was trained."
            )
        if not known.mean:
            mean, std = mean_and_std(images.train_images)
            known = replace(found, mean=mean, std=std)
        self.split.refuse_too_few(len(images.train_labels), images.whole)
        self.images = images
        self._set_facts(known)

    def reuse(self, other: Self) -> None:
        def location(module: Self) -> tuple[Any, ...]:
            return (
                *(module.dataset, module.dataset_args),
                *(module.source, module.root, module.mirrors),
            )

        if self.images is None and other.images and location(self) == location(other):
            self._use(other.images)

    def setup(self, stage: str) -> None:
        """Load the data and split off the validation images."""
        # Lightning calls prepare_data in only one process per machine.
        if self.images is None:
            self._use(self._read(may_download=False))
        images = self._loaded
        self.train_indices, self.val_indices = self.split.indices(
            images.train_labels, images.whole, self.seed
        )

    # What the framework asks

    @property
    def validates_on_test_set(self) -> bool:
        return self.split.val_images == 0

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
        images = self._loaded
        split = self.split
        part = "" if split.folds is None else f", fold {split.fold} of {split.folds} held out"
        if self.dataset == datasets.FASHION_MNIST:
            return f"Fashion-MNIST from {images.folder} ({images.source}){part}"
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.dataset_args.items())
        folder = "" if images.folder is None else f" from {images.folder}"
        return (
            f"{self.dataset}{f'({arguments})' if arguments else ''}{folder}: "
            f"{len(images.train_labels):,} training and {len(images.test_labels):,} test images, "
            f"{self.facts.shape}{part}"
        )

    def identity(self) -> dict[str, Any]:
        """Return the source of the images, and the sha256 of their content."""
        return {"source": self._loaded.source, "sha256": self._loaded.sha256}

    @classmethod
    def identity_in(cls, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        # Version 0.1.0 had only this data set.
        return super().identity_in(checkpoint) or dict(checkpoint.get("FashionMNIST") or {})

    def class_counts(self) -> Tensor:
        labels = self._loaded.train_labels[self.train_indices]
        return labels.bincount(minlength=self.num_classes)

    def test_samples(self) -> tuple[Tensor, Tensor]:
        """Return images, uint8 (N, H, W) or (N, C, H, W), and labels, int64 (N,)."""
        self.prepare_data()
        return self._loaded.test_images, self._loaded.test_labels

    def draw(self, inputs: Tensor) -> Tensor | None:
        return self.preprocessing.invert(inputs)

    def read_files(
        self, names: Sequence[str], invert: bool | None
    ) -> tuple[Tensor, list[dict[str, Any]], int]:
        """Read image files.

        For Fashion-MNIST, they are converted to the style of the data set (see
        `pictures.read`). For other data sets, see `pictures.read_as`.
        """
        has_style = self.dataset == datasets.FASHION_MNIST
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
