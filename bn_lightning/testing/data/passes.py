"""Passes over the loaders of an experiment, with Lightning's Trainer and without training."""

import gc
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
from bn_lightning.testing.data.changes import change_loaders
from bn_lightning.testing.data.contents import recorded
from bn_lightning.testing.data.loaders import Loader
from bn_lightning.testing.data.reading import NUM_KEPT, Plan, Reading
from bn_lightning.testing.data.source import quiet
from bn_lightning.training import lightning_internals, seeds
from bn_lightning.training.batches import ShardedBatches
from bn_lightning.training.data_module import DataModule


@cache
def read(plan: Plan) -> Reading:
    """Make the passes of a plan in this process, and leave its random generators unchanged.

    Raises:
        UserError: the settings or the data are refused.
    """
    with generators.unchanged(), quiet():
        return _read(plan)


def _read(plan: Plan) -> Reading:
    # `fit` also seeds the global generators at its start.
    seeds.seed_read(plan.source.arguments["seed"])
    if plan.disturbed:
        # Data that another data module still holds would be used again.
        gc.collect()
        seeds.seed_read(20)
    data = plan.source.build()
    change_loaders(data, plan.workers, plan.still)
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
    if reader.found.passes["val"]:
        # The loader is another one, after another call of setup().
        trainer.validate(reader, datamodule=data, verbose=False)
    trainer.test(reader, datamodule=data, verbose=False)
    if trainer.world_size == 1:
        try:
            data.predict_dataloader()
        except UserError:
            return
        trainer.predict(reader, datamodule=data, return_predictions=False)


class Reader(pl.LightningModule):
    """Records the batches that a Trainer passes to it. It has one weight, which is not trained."""

    def __init__(self, plan: Plan, data: DataModule) -> None:
        super().__init__()
        self.automatic_optimization = False
        # DistributedDataParallel needs a weight.
        self.weight = nn.Parameter(torch.zeros(1))
        self.plan, self.data = plan, data
        self.found = Reading()

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
        self.found.passes["train"].append([])

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if not self.found.passes["train"][0] and self.plan.still and self.plan.processes == 1:
            self.found.first = batch
        self._record("train", batch)

    # Evaluation

    def on_validation_start(self) -> None:
        self._start("val", self.trainer.val_dataloaders)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._record("val", batch)

    def on_test_start(self) -> None:
        self._start("test", self.trainer.test_dataloaders)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._record("test", batch)
        self._keep(self.found.tested, batch)

    def on_predict_start(self) -> None:
        self.found.passes["predict"].append([])

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._record("predict", batch)
        self._keep(self.found.predicted, batch)

    def _start(self, stage: str, loader: Any) -> None:
        self._describe(stage, loader)
        self.found.passes[stage].append([])

    def _record(self, stage: str, batch: Any) -> None:
        self.found.passes[stage][-1].append(recorded(batch))

    def _keep(self, kept: list[Tensor], batch: Any) -> None:
        if sum(map(len, kept)) < NUM_KEPT:
            kept.append(inputs_and_targets(batch)[0][0].clone())

    def _describe(self, stage: str, loader: Any) -> None:
        if stage not in self.found.loaders:
            reads = self.plan.still and self.plan.processes == 1
            # Reading draws random numbers.
            with generators.unchanged():
                self.found.loaders[stage] = Loader.of(loader, reads)


def _listed(counts: Tensor | None) -> list[int] | None:
    return None if counts is None else counts.tolist()
