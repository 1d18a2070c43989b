"""Passes over the loaders of an experiment, with Lightning's Trainer and without training."""

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from torch import Tensor, nn

from bn_lightning import generators
from bn_lightning.errors import UserError
from bn_lightning.runs import experiment as experiments
from bn_lightning.testing.batches import inputs_and_targets
from bn_lightning.testing.contents import Batch, Sample, recorded
from bn_lightning.testing.data_source import Source, quiet
from bn_lightning.testing.loaders import Loader, prepare
from bn_lightning.training import lightning_internals, seeds
from bn_lightning.training.batches import ShardedBatches
from bn_lightning.training.data_module import DataModule

STAGES = ("train", "val", "test", "predict")
# Samples whose values are kept, and samples that are augmented in two orders.
NUM_KEPT = 256


@dataclass(frozen=True)
class Plan:
    """Which passes are made.

    Attributes:
        source: the data module.
        epochs: the epochs of training, in order and without a gap.
        still: without augmentation; otherwise only the training samples are read.
        workers: worker processes of each loader.
        processes: number of processes (ranks).
        disturbed: whether the global generators are in another state, and `setup` is
            called once more.
    """

    source: Source
    epochs: tuple[int, ...] = (0,)
    still: bool = True
    workers: int = 0
    processes: int = 1
    disturbed: bool = False


@dataclass
class Reading:
    """What was read on one rank.

    Attributes:
        passes: the passes of each stage, each a list of batches.
        loaders: facts about the loader of each stage.
        stated: the attributes of the data module that the task needs, by name.
        classes: names of the classes.
        identity, class_counts: what the data module returns.
        first: the first batch of training.
        tested, predicted: the inputs of the first test samples, from two loaders.
        forwards, backwards: digests of the same augmented samples, read in two orders.
    """

    passes: dict[str, list[list[Batch]]] = field(default_factory=lambda: {s: [] for s in STAGES})
    loaders: dict[str, Loader] = field(default_factory=dict)
    stated: dict[str, Any] = field(default_factory=dict)
    classes: list[Any] | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    class_counts: list[int] | None = None
    first: Any = None
    tested: list[Tensor] = field(default_factory=list)
    predicted: list[Tensor] = field(default_factory=list)
    forwards: list[int] = field(default_factory=list)
    backwards: list[int] = field(default_factory=list)

    def batches(self) -> Iterator[tuple[str, Batch]]:
        """Yield the batches of the first passes of training, validation and test."""
        for stage in ("train", "val", "test"):
            for batch in self.passes[stage][0] if self.passes[stage] else []:
                yield stage, batch

    def all_samples(self, stage: str) -> list[list[Sample]]:
        """Return the samples of each pass, in order."""
        passes = self.passes[stage]
        return [[sample for batch in batches for sample in batch.samples] for batches in passes]

    def samples(self, stage: str, number: int = 0) -> list[Sample]:
        """Return the samples of a pass, in order; empty if there was no such pass."""
        return self.all_samples(stage)[number] if self.passes[stage] else []

    def inputs(self, stage: str, number: int = 0) -> Counter[int]:
        """Return the inputs of a pass, and how often each of them was read."""
        return Counter(sample.inputs for sample in self.samples(stage, number))


@cache
def read(plan: Plan) -> Reading:
    """Make the passes of a plan in this process, and leave its random generators unchanged.

    Raises:
        UserError: the settings or the data are refused.
    """
    with generators.unchanged(), quiet(), one_thread():
        return _read(plan)


def _read(plan: Plan) -> Reading:
    # `fit` also seeds the global generators at its start.
    seeds.seed_read(plan.source.arguments["seed"])
    if plan.disturbed:
        # Data that another data module still holds would be used again.
        gc.collect()
        seeds.seed_read(20)
    data = plan.source.build()
    _change(data, plan)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=plan.processes,
        strategy="ddp" if plan.processes > 1 else "auto",
        plugins=[LightningEnvironment()],
        max_epochs=plan.epochs[-1] + 1,
        num_sanity_val_steps=0,
        limit_val_batches=None if plan.still else 0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **plan.source.options,
    )
    if plan.disturbed:
        data.trainer = trainer
        data.prepare_data()
        data.setup("fit")
        seeds.seed_read(21)
    progress: Any = trainer.fit_loop.epoch_progress.current
    progress.ready = progress.processed = progress.completed = plan.epochs[0]
    reader = Reader(plan, data)
    trainer.fit(reader, datamodule=data)
    found = reader.found
    if plan.still:
        found.class_counts = _listed(data.class_counts())
        found.identity = data.identity()
        _evaluate(trainer, reader, data)
    task = experiments.load(plan.source.experiment).task
    found.stated = {name: getattr(data, name, None) for name in task.stated_by_data}
    found.classes = None if data.classes is None else list(data.classes)
    return found


def _evaluate(trainer: pl.Trainer, reader: "Reader", data: DataModule) -> None:
    if reader.passes["val"]:
        # The loader is another one, after another call of setup().
        trainer.validate(reader, datamodule=data, verbose=False)
    trainer.test(reader, datamodule=data, verbose=False)
    if trainer.world_size == 1:
        try:
            data.predict_dataloader()
        except UserError:
            return
        trainer.predict(reader, datamodule=data, return_predictions=False)


def _change(data: DataModule, plan: Plan) -> None:
    """Give the loaders of a data module the workers of a plan, and remove the augmentation."""
    for stage in STAGES:
        original = getattr(data, f"{stage}_dataloader")

        def changed(original: Any = original) -> Any:
            return prepare(original(), plan.workers, plan.still)

        # Lightning asks whether a data module has this method.
        changed.__wrapped__ = original  # type: ignore[attr-defined]
        setattr(data, f"{stage}_dataloader", changed)
    if plan.still:
        data.augmentation = lambda epoch: None  # type: ignore[method-assign]


class Reader(pl.LightningModule):
    """Records the batches that a Trainer passes to it. It has one weight, which is not trained."""

    def __init__(self, plan: Plan, data: DataModule) -> None:
        super().__init__()
        self.automatic_optimization = False
        # DistributedDataParallel needs a weight.
        self.weight = nn.Parameter(torch.zeros(1))
        self.plan, self.data = plan, data
        self.found = Reading()
        self.passes = self.found.passes

    def configure_optimizers(self) -> None:
        return None

    # Training

    def on_train_start(self) -> None:
        loader: Any = self.trainer.train_dataloader
        lightning_internals.call_before_fetches(self.trainer, partial(self._seed_fetch, loader))
        self._describe("train", loader)
        if not self.plan.still and isinstance(loader, ShardedBatches):
            order = loader.current_epoch().order[:NUM_KEPT]
            self.found.forwards = self._augmented(loader, order)
            self.found.backwards = self._augmented(loader, order.flip(0))[::-1]

    def _seed_fetch(self, loader: Any, batch_idx: int) -> None:
        # `fit` does the same; see `training.resume`.
        if getattr(loader, "is_random", True):
            cpu, rank = torch.device("cpu"), self.trainer.global_rank
            seeds.seed_fetch(self.data.seed, self.trainer.current_epoch, batch_idx, rank, cpu)

    def _augmented(self, loader: ShardedBatches, order: Tensor) -> list[int]:
        batches = loader.fixed(order, loader.current_epoch().augment)
        return [s.inputs for batch in batches for s in recorded(batch).samples]

    def on_train_epoch_start(self) -> None:
        self.passes["train"].append([])

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if self.found.first is None and self.plan.still:
            self.found.first = batch
        self.passes["train"][-1].append(recorded(batch))

    # Evaluation

    def on_validation_start(self) -> None:
        self._describe("val", self.trainer.val_dataloaders)
        self.passes["val"].append([])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.passes["val"][-1].append(recorded(batch))

    def on_test_start(self) -> None:
        self._describe("test", self.trainer.test_dataloaders)
        self.passes["test"].append([])

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.passes["test"][-1].append(recorded(batch))
        self._keep(self.found.tested, batch)

    def on_predict_start(self) -> None:
        self.passes["predict"].append([])

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.passes["predict"][-1].append(recorded(batch))
        self._keep(self.found.predicted, batch)

    def _keep(self, kept: list[Tensor], batch: Any) -> None:
        if sum(map(len, kept)) < NUM_KEPT:
            kept.append(inputs_and_targets(batch)[0][0].clone())

    def _describe(self, stage: str, loader: Any) -> None:
        if stage not in self.found.loaders:
            reads = self.plan.still and self.plan.processes == 1
            # Reading draws random numbers.
            with generators.unchanged():
                self.found.loaders[stage] = Loader.of(loader, reads)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread. Batches are small, and worker processes may be forked."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _listed(counts: Tensor | None) -> list[int] | None:
    return None if counts is None else counts.tolist()
