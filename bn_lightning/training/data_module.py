"""The base class of data modules: what the rest of the project may ask of any data."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from bn_lightning.errors import UserError
from bn_lightning.training import lightning_internals, seeds
from bn_lightning.training.batches import Augment, Epoch, TensorBatches

# The key of `DataModule.identity` in a checkpoint, whatever the class is called.
IDENTITY = "data"


class DataModule(pl.LightningDataModule):
    """Data of a run. A subclass has `setup` and the loaders, and declares what is said below.

    All arguments of a subclass are plain data; they become flags, `--data.batch_size`, and are kept
    in checkpoints. `**loading` passes those of this class on:

        class Table(DataModule):
            def __init__(self, rows: int = 1_000, **loading: Any) -> None:
                super().__init__(**loading)

    Args:
        batch_size: samples of one batch, over all processes together.
        seed: of the split and of the order of each epoch. On the command line `--seed_everything`.

    Attributes:
        classes: the names of the classes, by label; None without classes.
        preprocessing: from raw samples to the input of the network. The loaders, `export` and
            `predict` all use this module, so they agree.
        train_indices: the samples that are trained on, int64 (M,); set by `train_batches`.
        machine_settings: settings that belong to the machine, such as folders. They are not taken
            from a checkpoint, not logged, and may differ between the machines of a study.
        source_settings: settings that say where the data come from. They are taken from a
            checkpoint and may differ between the machines of a study.
        fixed_settings: settings that must not change when a run is resumed, and why.
        import_paths: settings whose value may be an import path. What only a checkpoint names is
            not imported.

    Raises:
        UserError: a batch size below 1, or a negative seed.
    """

    classes: Sequence[str] | None = None
    train_indices: Tensor
    machine_settings: ClassVar[tuple[str, ...]] = ()
    source_settings: ClassVar[tuple[str, ...]] = ()
    fixed_settings: ClassVar[Mapping[str, str]] = {
        "seed": "samples that were trained on would be validated on"
    }
    import_paths: ClassVar[tuple[str, ...]] = ()

    def __init__(self, batch_size: int = 256, seed: int = 0) -> None:
        super().__init__()
        # Also the arguments of the subclass. The logger gets them with the results, at the end.
        self.save_hyperparameters(logger=False)
        if batch_size < 1:
            raise UserError(
                f"batch_size is {batch_size}; it must be at least 1: --data.batch_size 256"
            )
        if seed < 0:
            raise UserError(f"The seed is {seed}; it must not be negative: --seed_everything 0")
        self.batch_size = batch_size
        self.seed = seed
        self.preprocessing: nn.Module = nn.Identity()

    # What a subclass may declare

    @property
    def validates_on_test_set(self) -> bool:
        """Whether the validation loader shows the test set; then no checkpoint is selected."""
        return False

    def describe(self) -> str:
        """Return what the data are and where they are, for the console."""
        return type(self).__name__

    def identity(self) -> dict[str, Any]:
        """Return what identifies the data, as plain data: a checksum, a number of rows.

        It is kept in each checkpoint and in result.json, and a run is not resumed with other data.
        The entry `source`, if there is one, says where the data come from and is not compared.
        """
        return {}

    def augmentation(self, epoch: int) -> Augment | None:
        """Return what changes the training samples of an epoch, or None."""
        return None

    def reuse(self, other: Self) -> None:
        """Take over what another module of this class has read, where both read the same.

        Called by processes that train several runs, before `prepare_data`.
        """

    def predict_dataloader(self) -> Any:
        """Return the loader of `predict`, by default of the test samples."""
        return self.batches(*self.test_samples())

    def test_samples(self) -> tuple[Tensor, Tensor]:
        """Return the raw samples of the test set and their targets, for `export` and `predict`.

        Raises:
            UserError: the data module does not offer them.
        """
        raise UserError(
            f"{type(self).__name__} has no test_samples(), which export and predict need."
        )

    def example_input(self) -> Tensor:
        """Return a few raw samples, (7, ...), for tracing and for the shape of the input."""
        inputs, _ = self.test_samples()
        return inputs[:7].clone()

    def draw(self, inputs: Tensor) -> Tensor | None:
        """Return pictures of network inputs, uint8 (N, H, W) or (N, H, W, 3); None without any."""
        return None

    def read_files(
        self, names: Sequence[str], invert: bool | None
    ) -> tuple[Tensor, list[dict[str, Any]], int]:
        """Read a person's own files for `predict`.

        Args:
            names: files, folders and patterns.
            invert: whether to exchange dark and bright; None decides by the file.

        Returns:
            Raw samples (N, ...), facts about each, and the number of files that are unreadable.

        Raises:
            UserError: the data module does not read files.
        """
        raise UserError(
            f"{type(self).__name__} does not read files: leave out --data.images to predict the "
            "test set."
        )

    # Loaders of tensors in memory

    def train_batches(self, inputs: Tensor, targets: Tensor, indices: Tensor) -> TensorBatches:
        """Return the training loader for the samples at `indices`, in an order that can be resumed.

        Raises:
            UserError: the last batch of an epoch has fewer samples than there are processes.
        """
        self.train_indices = indices
        processes = self.trainer.world_size if self.trainer else 1
        last = len(indices) % self.batch_size or self.batch_size
        if last < processes:
            raise UserError(
                f"The last batch of an epoch has {last} sample(s), but {processes} processes share "
                f"each batch: {len(indices):,} training samples in batches of {self.batch_size}.\n"
                "Choose another batch size, for example --data.batch_size 256."
            )
        return self._tensor_batches(inputs, targets, indices, self._epoch)

    def batches(
        self, inputs: Tensor, targets: Tensor, indices: Tensor | None = None
    ) -> TensorBatches:
        """Return a loader that visits the samples at `indices`, or all, once and in their order."""
        if indices is None:
            indices = torch.arange(len(inputs))
        return self._tensor_batches(inputs, targets, indices)

    def train_order(self, epoch: int) -> Tensor:
        """Return the samples of an epoch in the order in which they are visited, int64 (M,)."""
        if getattr(self.trainer, "overfit_batches", 0):
            return self.train_indices  # the same few batches again and again
        return self.train_indices[seeds.epoch_order(len(self.train_indices), self.seed, epoch)]

    def _epoch(self) -> Epoch:
        """Return what the trainer's epoch visits, from the first batch that was not trained on."""
        number = self.trainer.current_epoch if self.trainer else 0
        first = lightning_internals.first_batch(self.trainer) if self.trainer else 0
        return Epoch(self.train_order(number), first, self.augmentation(number))

    def _tensor_batches(
        self, inputs: Tensor, targets: Tensor, indices: Tensor, epoch: Any = None
    ) -> TensorBatches:
        trainer = self.trainer
        device = trainer.strategy.root_device if trainer else torch.device("cpu")
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        inputs, targets = inputs.to(device), targets.to(device)
        return TensorBatches(
            inputs, targets, indices, self.batch_size, epoch, rank, world_size, self.preprocessing
        )

    # Data in a checkpoint

    @classmethod
    def identity_in(cls, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """Return the `identity` of the data that a checkpoint was trained on; empty if unknown."""
        # Version 0.1.0 kept it under the name of the class.
        return dict(checkpoint.get(IDENTITY) or checkpoint.get(cls.__qualname__) or {})

    def refuse_other_data(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse to resume training with data other than those of the checkpoint.

        Raises:
            UserError: the checkpoint was trained on other data.
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
        ]
        source = f" (source {before['source']})" if "source" in before else ""
        raise UserError(
            f"The checkpoint was trained on other data{source}. The data now are: "
            f"{self.describe()}. A run cannot be resumed with other data.\n"
            + (f"The settings were: {', '.join(differ)}. " if differ else "")
            + "Use the same data, or start a new run without the checkpoint."
        )
