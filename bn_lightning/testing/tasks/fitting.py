"""A task that is trained on one batch, and what is observed meanwhile."""

import copy
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torchmetrics import Metric

from bn_lightning.deploy import served
from bn_lightning.runs import run
from bn_lightning.testing import batches
from bn_lightning.testing.experiments import ExperimentTests
from bn_lightning.training.batches import ExactLoader
from bn_lightning.training.data_module import DataModule
from bn_lightning.training.task import Stage, Task

# The batch has at most this number of samples, and is trained on at most this number of
# times.
SAMPLES, STEPS = 32, 240
# Settings that are only about the length of a run.
ONE_EPOCH = (
    *("--trainer.max_epochs", "1", "--trainer.max_steps", "-1"),
    *("--trainer.limit_train_batches", "1.0", "--trainer.accumulate_grad_batches", "1"),
    *("--trainer.limit_val_batches", "1.0", "--trainer.limit_test_batches", "1.0"),
    *("--trainer.check_val_every_n_epoch", "1", "--trainer.val_check_interval", "1.0"),
    *("--trainer.num_sanity_val_steps", "0", "--trainer.enable_checkpointing", "false"),
    *("--trainer.logger", "false", "--monitor", "false", "--precise_statistics", "0"),
)
# Settings of `Task`. A subclass may lack some of them.
PLAIN = {"scheduler": "null", "warmup_steps": "0", "compile": "false"}
PLAIN |= {"memory_format": "contiguous"}


class Watch(pl.Callback):
    """Record losses and gradients, and end training when the loss is low.

    Args:
        fraction: the fraction of the first loss at which training ends.

    Attributes:
        losses: the loss of each step.
        without_gradient: names of the parameters that have had no gradient, or only zero.
        left_out: names of the parameters that no optimizer has.
    """

    def __init__(self, fraction: float) -> None:
        self.fraction = fraction
        self.losses: list[float] = []
        self.without_gradient: set[str] = set()
        self.left_out: list[str] = []

    @property
    def target(self) -> float:
        """The loss to reach. It is below a first loss that is negative too."""
        first = self.losses[0]
        return first - (1 - self.fraction) * abs(first)

    @property
    def has_fallen(self) -> bool:
        return bool(self.losses) and min(self.losses) <= self.target

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trained = {
            id(parameter)
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        parameters = _trainable(pl_module)
        self.without_gradient = set(parameters)
        self.left_out = [name for name, value in parameters.items() if id(value) not in trained]

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, parameter in _trainable(pl_module).items():
            if parameter.grad is not None and bool(parameter.grad.any()):
                self.without_gradient.discard(name)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if loss is None:
            return
        self.losses.append(float(loss))
        # A few steps more, so that running statistics have moved.
        if not math.isfinite(self.losses[-1]) or (self.has_fallen and len(self.losses) >= 8):
            trainer.should_stop = True


def _trainable(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: value for name, value in module.named_parameters() if value.requires_grad}


@dataclass
class Fitted:
    """A task that was trained on one batch.

    Attributes:
        cli: the command line, which has the trainer.
        batch: the batch.
        watch: what was observed.
        new_metrics: copies of the metrics, made before training.
        checkpoint: the checkpoint of the trained task.
        outputs: the outputs of the trained task for the batch, in eval mode.
        is_exact: whether the training loader can be resumed and shared exactly.
    """

    cli: run.CLI
    batch: Any
    watch: Watch
    new_metrics: dict[str, Metric]
    checkpoint: Path
    outputs: Tensor
    is_exact: bool
    tried: list[str] = field(default_factory=list)

    @property
    def task(self) -> Task:
        return self.cli.model

    @property
    def data(self) -> DataModule:
        return self.cli.datamodule

    @cached_property
    def trusted(self) -> dict[str, str]:
        """Import paths in the settings of the tests, which `restore` would refuse."""
        names = served.import_flags(self.cli.experiment)
        chosen = {name: self.cli.config.fit.get(name) for name in names}
        return {name: value for name, value in chosen.items() if isinstance(value, str)}

    def restore(self) -> served.Restored:
        """Return a new task with the weights of the checkpoint."""
        reference = self.cli.reference
        return served.restore(str(self.checkpoint), reference, self.trusted)

    def evaluate(self, stage: Stage, parts: list[Any]) -> dict[str, float]:
        """Return all that is logged when the task is evaluated on some batches."""
        trainer, data = self.cli.trainer, self.data
        loader = "val_dataloader" if stage == "val" else "test_dataloader"
        command = trainer.validate if stage == "val" else trainer.test
        vars(data)[loader] = lambda: batches.FixedBatches(parts)
        try:
            command(self.task, datamodule=data, verbose=False)
        finally:
            del vars(data)[loader]
            self.task.trainer = None
        return {name: float(value) for name, value in trainer.callback_metrics.items()}


def fit(tests: type[ExperimentTests], folder: Path, fraction: float) -> Fitted:
    """Train on one batch until the loss is low.

    The learning rate of the experiment may be too high without its schedule, so two
    other settings are tried if the loss does not fall.
    """
    model = tests.build().config.fit.model
    plain = _flags({name: value for name, value in PLAIN.items() if name in model})
    settings: dict[str, tuple[str, ...]] = {"the settings of the experiment": ()}
    if "lr" in model:
        lr = float(model.lr)
        settings[f"learning rate {lr / 10:g}"] = _flags({"lr": f"{lr / 10}"})
    if {"lr", "optimizer", "optimizer_args"} <= set(vars(model)):
        adam = {"optimizer": "AdamW", "optimizer_args": "null", "lr": "0.01"}
        settings["AdamW with learning rate 0.01"] = _flags(adam)
    for flags in settings.values():
        fitted = _fit_once(tests, (*plain, *flags), folder, fraction)
        if fitted.watch.has_fallen:
            break
    fitted.tried = list(settings)
    return fitted


def _flags(model: dict[str, str]) -> tuple[str, ...]:
    return tuple(word for name, value in model.items() for word in (f"--model.{name}", value))


def _fit_once(
    tests: type[ExperimentTests], flags: tuple[str, ...], folder: Path, fraction: float
) -> Fitted:
    cli = tests.build(*ONE_EPOCH, "--trainer.default_root_dir", str(folder), *flags)
    task, data, trainer = cli.model, cli.datamodule, cli.trainer
    data.trainer = trainer
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    batch = next(iter(loader))
    batch = batches.part(batch, 0, min(SAMPLES, batches.count(batch)))
    new_metrics = {
        name: copy.deepcopy(module)
        for name, module in task.named_children()
        if isinstance(module, Metric)
    }
    watch = Watch(fraction)
    trainer.callbacks.append(watch)  # type: ignore[attr-defined]
    # An attribute of the object hides the method of its class.
    vars(data)["train_dataloader"] = lambda: batches.FixedBatches([batch] * STEPS)
    vars(data)["val_dataloader"] = lambda: batches.FixedBatches([batch])
    try:
        trainer.fit(task, datamodule=data)
    finally:
        del vars(data)["train_dataloader"], vars(data)["val_dataloader"]
    trainer.callbacks.remove(watch)  # type: ignore[attr-defined]
    checkpoint = folder / "trained.ckpt"
    trainer.save_checkpoint(checkpoint, weights_only=False)
    # Without a trainer, self.log() in a step does nothing.
    task.trainer = None
    outputs = outputs_of(task, batch)
    is_exact = isinstance(loader, ExactLoader)
    return Fitted(cli, batch, watch, new_metrics, checkpoint, outputs, is_exact)


@torch.no_grad()
def outputs_of(task: Task, batch: Any, stage: str = "val") -> Tensor:
    """Return the outputs of a task for a batch, in eval mode."""
    task.eval()
    step = task.step(copy.deepcopy(batch), stage)  # type: ignore[arg-type]
    return step.outputs.detach().clone()
