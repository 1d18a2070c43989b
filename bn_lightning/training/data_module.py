"""The base class of data modules."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self
from weakref import WeakValueDictionary

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from bn_lightning.errors import UserError
from bn_lightning.training import seeds
from bn_lightning.training.batches import Augment, Epoch, TensorBatches, training_epoch

# Copies on a GPU, by the tensor in main memory, for as long as a loader uses them.
_copies: WeakValueDictionary[Tensor, Tensor] = WeakValueDictionary()

# The key of `DataModule.identity` in a checkpoint, the same for every subclass.
IDENTITY = "data"


class DataModule(pl.LightningDataModule):
    """Base class of data modules.

    A subclass implements `setup` and the loaders, and overrides the attributes and
    methods below as needed. All arguments of its `__init__` must be plain data: they
    become flags such as `--data.batch_size`, and are saved in checkpoints. A subclass
    accepts the arguments of this class as `**loading`, and forwards them:

        class Table(DataModule):
            def __init__(self, rows: int = 1_000, **loading: Any) -> None:
                super().__init__(**loading)

    Args:
        batch_size: total number of samples per batch. All processes share each batch.
        seed: seed of the data split and of the order of samples; set by
            `--seed_everything`.

    Attributes:
        classes: names of the classes, indexed by label; None if the data have no
            classes.
        preprocessing: a module that maps raw samples to the input of the network. The
            loaders, `export` and `predict` use it.
        train_indices: indices of the training samples, int64 (M,); set by
            `train_batches`.
        machine_settings: names of the settings that depend on the machine, such as
            folders. They are neither restored from a checkpoint nor logged, and may
            differ between the machines of a study.
        source_settings: names of the settings that locate the data. They are restored
            from a checkpoint, and may differ between the machines of a study.
        fixed_settings: names of the settings that must not change when a run is
            resumed, each with what would happen otherwise.
        repetitions: names of the settings whose values repeat a run, such as the fold of
            cross-validation. `compare` treats them like seeds: it compares variants in
            pairs of runs of the same fold, and reports the mean and the spread over
            folds.
        import_paths: names of the settings whose value may be an import path. An import
            path that only a checkpoint contains is not imported.
        found_in_data: names of the arguments whose value is found in the data, such as
            the size of images. They are not flags. If one is None, the data are read;
            a checkpoint contains the values, and then the data need not be read to
            construct the data module.

    Raises:
        UserError: the batch size is below 1, or the seed is negative.
    """

    classes: Sequence[str] | None = None
    train_indices: Tensor
    machine_settings: ClassVar[tuple[str, ...]] = ()
    source_settings: ClassVar[tuple[str, ...]] = ()
    fixed_settings: ClassVar[Mapping[str, str]] = {
        "seed": "training samples would move to the validation set"
    }
    repetitions: ClassVar[tuple[str, ...]] = ()
    import_paths: ClassVar[tuple[str, ...]] = ()
    found_in_data: ClassVar[tuple[str, ...]] = ()

    def __init__(self, batch_size: int = 256, seed: int = 0) -> None:
        super().__init__()
        # This also saves the arguments of the subclass. They are not logged here, but
        # with the results at the end of the run.
        self.save_hyperparameters(logger=False)
        if batch_size < 1:
            raise UserError(
                f"batch_size is {batch_size}; it must be at least 1, for example "
                "--data.batch_size 256."
            )
        if seed < 0:
            raise UserError(
                f"The seed is {seed}; it must not be negative, for example --seed_everything 0."
            )
        self.batch_size = batch_size
        self.seed = seed
        self.preprocessing: nn.Module = nn.Identity()

    # Methods that a subclass may override

    @property
    def validates_on_test_set(self) -> bool:
        """Whether validation uses the test set.

        If so, no best checkpoint is selected.
        """
        return False

    @property
    def has_validation_set(self) -> bool:
        """Whether the validation samples are not held-out training samples, but of their own."""
        return False

    def describe(self) -> str:
        """Return a description of the data and their location, for the console.

        It is called after `prepare_data`, before `setup`.
        """
        return type(self).__name__

    def notes(self) -> list[str]:
        """Return remarks on the data for the console, such as samples that were left out."""
        return []

    def identity(self) -> dict[str, Any]:
        """Return values that identify the data, such as a checksum or a number of rows.

        The values must be plain data. They are saved in each checkpoint and in
        result.json. A run is resumed only if the values of the current data equal those
        in the checkpoint. The optional entry `source` names the origin of the data. It
        is not compared.
        """
        return {}

    def class_counts(self) -> Tensor | None:
        """Return the number of training samples of each class, int64 (C,), after `setup`.

        Return None if it is not known.
        """
        return None

    def augmentation(self, epoch: int) -> Augment | None:
        """Return the augmentation of the training samples in an epoch, or None."""
        return None

    def reuse(self, other: Self) -> None:
        """Reuse the data of another module of this class, if its settings match.

        A process that trains several runs calls this before `prepare_data`, so that the
        data are loaded only once.
        """

    def predict_dataloader(self) -> Any:
        """Return the loader for `predict`. By default, it loads the test samples."""
        return self.batches(*self.test_samples())

    def test_samples(self) -> tuple[Tensor, Tensor]:
        """Return the raw samples of the test set and their targets, for `export` and `predict`.

        Raises:
            UserError: the data module does not implement this method.
        """
        raise UserError(
            f"{type(self).__name__} has no test_samples(). Implement this method: export and "
            "predict require it."
        )

    def test_names(self) -> Sequence[int | str]:
        """Return what `predict` calls each test sample, such as its file; by default its index."""
        _, targets = self.test_samples()
        return range(len(targets))

    def example_input(self) -> Tensor:
        """Return raw samples (7, ...), to trace the network and find its input shape."""
        inputs, _ = self.test_samples()
        return inputs[:7].clone()

    def draw(self, inputs: Tensor) -> Tensor | None:
        """Return network inputs as images, uint8 (N, H, W) or (N, H, W, 3).

        Return None if the data cannot be shown as images.
        """
        return None

    def read_files(
        self, names: Sequence[str], invert: bool | None
    ) -> tuple[Tensor, list[dict[str, Any]], int]:
        """Read the user's own files for `predict`.

        Args:
            names: files, folders and glob patterns.
            invert: whether to invert brightness; if None, this is decided for each
                file.

        Returns:
            The raw samples (N, ...), a dict of information on each sample, and the
            number of files that cannot be read.

        Raises:
            UserError: the data module does not implement this method.
        """
        raise UserError(
            f"{type(self).__name__} cannot read files. Remove --data.images to predict the test "
            "set."
        )

    # Loaders of tensors in memory

    def train_batches(self, inputs: Tensor, targets: Tensor, indices: Tensor) -> TensorBatches:
        """Return the training loader of the samples at `indices`.

        It supports exact resuming, also within an epoch.
        """
        self.train_indices = indices
        return self._tensor_batches(inputs, targets, indices, self._epoch)

    def batches(
        self, inputs: Tensor, targets: Tensor, indices: Tensor | None = None
    ) -> TensorBatches:
        """Return a loader of the samples at `indices`, in that order.

        By default, it loads all samples.

        Raises:
            UserError: there are fewer samples than processes.
        """
        if indices is None:
            indices = torch.arange(len(inputs))
        return self._tensor_batches(inputs, targets, indices)

    def train_order(self, epoch: int) -> Tensor:
        """Return the indices of the training samples in the order of an epoch, int64 (M,)."""
        return seeds.shuffled(self.train_indices, self.seed, epoch, self.trainer)

    def _epoch(self) -> Epoch:
        """Return the current epoch, starting at the first batch to train."""
        return training_epoch(self.trainer, self.train_order, self.augmentation)

    def _tensor_batches(
        self, inputs: Tensor, targets: Tensor, indices: Tensor, epoch: Any = None
    ) -> TensorBatches:
        trainer = self.trainer
        device = trainer.strategy.root_device if trainer else torch.device("cpu")
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        inputs, targets = _on_device(inputs, device), _on_device(targets, device)
        return TensorBatches(
            inputs, targets, indices, self.batch_size, epoch, rank, world_size, self.preprocessing
        )

    # Comparison with the data of a checkpoint

    @classmethod
    def identity_in(cls, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """Return the `identity` that a checkpoint contains, or an empty dict."""
        # Version 0.1.0 saved the identity under the name of the class.
        return dict(checkpoint.get(IDENTITY) or checkpoint.get(cls.__qualname__) or {})

    def refuse_other_data(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse to resume training if the data differ from those of the checkpoint.

        Raises:
            UserError: the data differ.
        """
        before, now = self.identity_in(checkpoint), self.identity()
        is_training = self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING
        same = all(before[name] == now.get(name) for name in before if name != "source")
        if same or not is_training:
            return
        settings = checkpoint.get("datamodule_hyper_parameters", {})
        differ = [
            f"--data.{name} {settings[name]} (now {self.hparams[name]})"
            for name in settings
            if name in self.hparams and settings[name] != self.hparams[name]
            if name not in self.found_in_data
        ]
        source = f" (source {before['source']})" if "source" in before else ""
        raise UserError(
            f"The checkpoint was trained on other data{source}. "
            f"The current data: {self.describe()}.\n"
            + (f"These settings differ: {', '.join(differ)}.\n" if differ else "")
            + f"These values differ: {', '.join(_differences(before, now))}.\n"
            + "Use the same data, or start a new run without the checkpoint."
        )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the values of an identity that differ, in words."""
    lines = []
    for name, value in before.items():
        if name == "source" or value == now.get(name):
            continue
        for key, part in value.items() if isinstance(value, Mapping) else [("", value)]:
            other = now.get(name)
            other = other.get(key) if isinstance(other, Mapping) else other
            # A checksum says nothing to a reader.
            shown = f" {part} (now {other})" if isinstance(part, int | float) else ""
            if part != other:
                lines.append(f"{name} {key}".rstrip() + shown)
    return lines


def _on_device(samples: Tensor, device: torch.device) -> Tensor:
    """Return samples on a device. Loaders of the same samples share one copy."""
    if samples.device == device:
        return samples
    copy = _copies.get(samples)
    if copy is None or copy.device != device:
        copy = _copies[samples] = samples.to(device)
    return copy
