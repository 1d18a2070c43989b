"""The base class of tasks: everything in a LightningModule that does not depend on what is learned."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from bn_lightning.norms import recognition
from bn_lightning.training import data_module, unfinished_epoch
from bn_lightning.training.optimization import Optimization

Stage = Literal["train", "val", "test"]
MemoryFormat = Literal["auto", "channels_last", "contiguous"]


class Step(NamedTuple):
    """What one step returns.

    `loss` is the mean over the samples; `outputs` and `targets` go to the metrics; `num_samples` is
    the number of samples in this process's shard of the batch.
    """

    loss: Tensor
    outputs: Tensor
    targets: Tensor
    num_samples: int


class Task(pl.LightningModule):
    """A network with its loss, metrics, optimizer and schedule, for any data.

    A subclass gives its network and metrics to this constructor, and says what one step is. All of
    its own arguments are plain data: they become flags, `--model.width`, and are kept in
    checkpoints, which load with `weights_only=True`. `**training` passes those of this class on, so
    a subclass gets new ones without a change:

        class Regression(Task):
            selects = ("val_rmse", "min")

            def __init__(self, width: int = 32, **training: Any) -> None:
                super().__init__(
                    MLP(width), {"rmse": MeanSquaredError(squared=False)}, **training
                )

            def step(self, batch, stage):
                inputs, targets = batch
                outputs = self(inputs)
                return Step(F.mse_loss(outputs, targets), outputs, targets, len(targets))

    Args:
        network: what is trained. Its weights have the prefix `network.` in a checkpoint.
        metrics: torchmetrics by name, each updated with (outputs, targets). They are logged as
            means over an epoch: `rmse` becomes `train_rmse`, `val_rmse` and `test_rmse`. The loss
            is one already.
        lr: learning rate; of OneCycleLR the peak.
        optimizer: a class of `torch.optim`, or an import path.
        optimizer_args: further arguments of the optimizer, such as
            `--model.optimizer_args.momentum 0.9`.
        scheduler: a class of `torch.optim.lr_scheduler`, or an import path; None keeps the learning
            rate. A schedule that needs the length of the run (OneCycleLR, CosineAnnealingLR) is
            told the number of steps and moves at each; others move at the end of each epoch.
        scheduler_args: further arguments of the scheduler, such as
            `--model.scheduler_args.pct_start 0.2`.
        compile: run the network through `torch.compile`. Checkpoints are the same.
        memory_format: of the network. `auto` is channels-last on a CPU if every norm layer of the
            network declares that it prefers it, or the network has none; else contiguous.

    Attributes:
        selects: the metric that selects the best checkpoint, and whether the largest (`max`) or the
            smallest (`min`) value is best.
        import_paths: settings whose value may be an import path. What only a checkpoint names is
            not imported.
        confusion: counts of the last test by class, (C, C), rows by truth and columns by
            prediction; None for a task without classes.
        step_samples: samples of the last training step, over all processes.

    Raises:
        UserError: an unknown optimizer or scheduler, or arguments that it does not take.
    """

    selects: ClassVar[tuple[str, Literal["min", "max"]]] = ("val_loss", "min")
    import_paths: ClassVar[tuple[str, ...]] = ("optimizer", "scheduler")
    confusion: Tensor | None = None
    network: nn.Module

    def __init__(
        self,
        network: nn.Module,
        metrics: Mapping[str, Metric] | None = None,
        lr: float = 0.1,
        optimizer: str = "SGD",
        optimizer_args: dict[str, Any] | None = None,
        scheduler: str | None = None,
        scheduler_args: dict[str, Any] | None = None,
        compile: bool = False,
        memory_format: MemoryFormat = "auto",
    ) -> None:
        super().__init__()
        # Also the arguments of the subclass. The logger gets them with the results, at the end.
        self.save_hyperparameters(ignore=self._objects(), logger=False)
        self.network = network
        self.optimization = Optimization(lr, optimizer, optimizer_args, scheduler, scheduler_args)
        self.optimization.check(network.parameters())
        self.metric_names = ("loss", *(metrics or {}))
        for stage in ("train", "val", "test"):
            # With "disable" a NaN is not left out of the mean.
            setattr(self, f"{stage}_loss", MeanMetric(nan_strategy="disable"))
            for name, metric in (metrics or {}).items():
                setattr(self, f"{stage}_{name}", metric.clone())
        self.step_samples = 0
        self._is_set_up = False
        self._means_are_logged = False
        self._overrides_checkpoint = False
        self._restored_metrics: dict[str, Any] = {}

    @classmethod
    def _objects(cls) -> list[str]:
        """Return the arguments that are objects, not settings; a subclass may have such settings."""
        is_overridden = cls.__init__ is not Task.__init__
        settings = inspect.signature(cls).parameters if is_overridden else {}
        return [name for name in ("network", "metrics") if name not in settings]

    # What a subclass says

    def step(self, batch: Any, stage: Stage) -> Step:
        """Return the loss, outputs, targets and number of samples of one batch."""
        raise NotImplementedError(f"{type(self).__name__} has no step()")

    def describe(self) -> str:
        """Return what is trained, for the console."""
        return type(self.network).__name__

    def facts(self) -> dict[str, Any]:
        """Return what result.json is to say about the network, as plain data."""
        return {}

    def summary(self) -> list[str]:
        """Return lines for the end of a run, after its metrics."""
        return []

    def test_report(self) -> str:
        """Return what a test found beyond its metrics."""
        return "no table of classes: this task has no classes"

    # Metrics

    @classmethod
    def best(cls, validations: Iterable[Mapping[str, float]]) -> Mapping[str, float]:
        """Return the best of some validations by the metric that selects; empty without any."""
        name, mode = cls.selects
        best = max if mode == "max" else min
        return best(validations, key=lambda metrics: metrics[name], default={})

    def names(self, stage: Stage) -> list[str]:
        """Return the names of the stage's metrics in logs and records, the loss first."""
        return [f"{stage}_{name}" for name in self.metric_names]

    def _measured_step(self, batch: Any, stage: Stage) -> Step:
        step = self.step(batch, stage)
        # Once for each sample, instead of a weight: torchmetrics 1.9 ignores weights together with
        # nan_strategy="disable".
        getattr(self, f"{stage}_loss").update(step.loss.detach().expand(step.num_samples))
        for name in self.metric_names[1:]:
            getattr(self, f"{stage}_{name}").update(step.outputs.detach(), step.targets)
        return step

    def _log_means(self, stage: Stage) -> None:
        """Log the means over the epoch. Lightning computes and resets the metrics."""
        for name in self.names(stage):
            # `train_loss` itself is the curve by steps.
            tag = f"{name}_epoch" if name == "train_loss" else name
            in_bar = stage != "test" and not name.endswith("_loss")
            self.log(tag, getattr(self, name), on_step=False, on_epoch=True, prog_bar=in_bar)

    # Training

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs of the network."""
        return self.network(inputs)  # type: ignore[no-any-return]

    def setup(self, stage: str) -> None:
        if self._is_set_up:  # Lightning calls again for the test after fit
            return
        self._is_set_up = True
        layout = self.hparams["memory_format"]
        if layout == "auto":
            # On a CPU convolutions are faster in channels-last order. Norm layers may be slower:
            # PyTorch's takes 2 to 4 times as long where channels are few.
            on_cpu = self.trainer.strategy.root_device.type == "cpu"
            if on_cpu and recognition.prefers_channels_last(self.network):
                layout = "channels_last"
        if layout == "channels_last":
            self.network.to(memory_format=torch.channels_last)
        if self.hparams["compile"]:
            self.network.compile()  # in place: a wrapper would add _orig_mod to each weight's name

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        step = self._measured_step(batch, "train")
        loss, processes = step.loss, self.trainer.world_size
        self.step_samples = self._samples_of_all(batch_idx, step.num_samples)
        if processes > 1:
            # The gradients of all processes are averaged, and their shards may differ in size.
            loss = loss * (step.num_samples * processes / self.step_samples)
        # self.log costs as much as a small layer. So the means are logged once an epoch, since
        # Lightning keeps the metric objects, and the loss only when the logger takes it.
        if not self._means_are_logged:
            self._log_means("train")
            self._means_are_logged = True
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.global_step + 1) % every == 0:
            self.log("train_loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def _samples_of_all(self, batch_idx: int, own: int) -> int:
        """Return the samples of a batch over all processes.

        For a loader that does not say, all shards are assumed to have the same size.
        """
        size_of = getattr(self.trainer.train_dataloader, "size_of", None)
        return size_of(batch_idx) if size_of else own * self.trainer.world_size

    def on_train_start(self) -> None:
        if self._overrides_checkpoint and self.optimization.scheduler is None:
            for group in self.trainer.optimizers[0].param_groups:
                group.update(lr=self.optimization.lr, **self.optimization.optimizer_args)
        self.optimization.refuse_another_length(self.trainer)
        own = self._train_metrics()
        unfinished_epoch.restore(
            own, self._restored_metrics, self.global_rank, self.trainer.world_size
        )
        self._restored_metrics = {}

    def on_train_epoch_end(self) -> None:
        # A run that was resumed after the last step of an epoch has logged none of its metrics, so
        # Lightning does not reset them.
        if not self._means_are_logged:
            for metric in self._train_metrics().values():
                metric.reset()
        self._means_are_logged = False

    def _train_metrics(self) -> dict[str, Metric]:
        return {name: getattr(self, name) for name in self.names("train")}

    def configure_optimizers(self) -> Any:
        return self.optimization.configure(
            self.parameters(), lambda: self.trainer.estimated_stepping_batches
        )

    # Evaluation

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._measured_step(batch, "val")

    def on_validation_epoch_end(self) -> None:
        self._log_means("val")

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the outputs, for callbacks."""
        return self._measured_step(batch, "test").outputs

    def on_test_epoch_end(self) -> None:
        self._log_means("test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return what `predict` prints: with classes, probabilities (B, C)."""
        return self(batch[0])  # type: ignore[no-any-return]

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["train_metrics"] = unfinished_epoch.save(
            self._train_metrics(), self.trainer.world_size
        )
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, data_module.DataModule):
            checkpoint[data_module.IDENTITY] = data.identity()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._restored_metrics = checkpoint.get("train_metrics", {})
        if self._trainer is not None:
            data = self._trainer.datamodule  # type: ignore[attr-defined]
            if isinstance(data, data_module.DataModule):
                data.refuse_other_data(checkpoint)
            # Lightning loads the weights before it converts the module to its precision. Weights in
            # float64 would be rounded on the way.
            self._trainer.precision_plugin.convert_module(self)
        # A resumed optimizer has the learning rate of its checkpoint. What is set now takes
        # precedence, except with a schedule, which continues as it was.
        before = checkpoint.get("hyper_parameters", {})
        overriding = ("lr", "optimizer_args")
        self._overrides_checkpoint = any(before.get(n) != self.hparams[n] for n in overriding)
