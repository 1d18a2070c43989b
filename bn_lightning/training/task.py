"""The base class of tasks: the parts of a LightningModule that do not depend on the problem."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Self

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from bn_lightning.norms import recognition
from bn_lightning.training import (
    channels_last,
    checkpoints,
    data_module,
    initial_weights,
    monitors,
    small_batches,
)
from bn_lightning.training.optimization import Groups, Optimization, parameter_groups

Stage = Literal["train", "val", "test"]
MemoryFormat = Literal["auto", "channels_last", "contiguous"]


class Step(NamedTuple):
    """The result of `Task.step` for one batch.

    Attributes:
        loss: mean loss over the samples.
        outputs, targets: the inputs of the metrics.
        num_samples: number of samples in this rank's shard of the batch.
    """

    loss: Tensor
    outputs: Tensor
    targets: Tensor
    num_samples: int


class Task(pl.LightningModule):
    """Base class for tasks: a network with its loss, metrics, optimizer and scheduler.

    A subclass passes its network and metrics to this constructor, and implements `step`.
    All of its own arguments must be plain data: they become flags such as
    `--model.width`, and are saved in checkpoints, which load with `weights_only=True`.
    `**training` forwards the arguments of this class, so a subclass also accepts
    arguments that are added to it later. Pass the network and the metrics by keyword.
    With positional arguments, a class that inherits this `__init__` may lack a flag, such
    as `--model.lr`, because jsonargparse counts them as arguments of the subclass:

        class Regression(Task):
            selects = ("val_rmse", "min")

            def __init__(self, width: int = 32, **training: Any) -> None:
                metrics = {"rmse": MeanSquaredError(squared=False)}
                super().__init__(network=MLP(width), metrics=metrics, **training)

            def step(self, batch, stage):
                inputs, targets = batch
                outputs = self(inputs)
                return Step(F.mse_loss(outputs, targets), outputs, targets, len(targets))

    Args:
        network: the network to train. Its weights have the prefix `network.` in a
            checkpoint.
        metrics: metrics of torchmetrics by name, each updated with (outputs, targets).
            Their values over an epoch are logged: `rmse` as `train_rmse`, `val_rmse`
            and `test_rmse`. The loss is always logged.
        lr: learning rate; with OneCycleLR, the maximum.
        optimizer: class in `torch.optim`, or an import path.
        optimizer_args: other arguments of the optimizer, for example
            `--model.optimizer_args.momentum 0.9`.
        scheduler: class in `torch.optim.lr_scheduler`, or an import path; null for a
            constant learning rate. Schedulers that need the number of steps, such as
            OneCycleLR, are updated after each step, all others after each epoch.
        scheduler_args: other arguments of the scheduler, for example
            `--model.scheduler_args.pct_start 0.2`. ReduceLROnPlateau also has `monitor`,
            the metric that it monitors (default: val_loss).
        decay_norms_and_biases: apply the optimizer's weight decay to the parameters of norm
            layers and to all biases too.
        warmup_steps: number of first steps in which the learning rate grows linearly to
            that of the schedule; 0 for no warmup.
        init_from: file with initial weights: a checkpoint or a plain state dict. Tensors
            that match the network in name and shape are loaded, and all others are
            listed. It is ignored if a checkpoint is loaded.
        compile: compile the network with `torch.compile`; checkpoints are not affected.
        memory_format: memory format of the convolutions; `auto` selects channels-last on
            a CPU if all norm layers prefer it, otherwise contiguous. Weights are always
            contiguous.

    Attributes:
        selects: the metric that selects the best checkpoint, and whether the largest
            (`max`) or the smallest (`min`) value is best.
        import_paths: settings whose value may be an import path. An import path that
            comes only from a checkpoint is not imported.
        stated_by_data: arguments that are attributes of the data module, such as the
            number of classes. They are not flags.
        registered: settings with names that contain a dot but are no import paths, each
            with the prefix of these names.
        start_only: settings, or keys of settings such as `network_args.weights`, that
            only set the initial weights. A checkpoint does not contain them.
        confusion: confusion matrix of the last test, (C, C), a row per true class and a
            column per predicted class; None for a task without classes.
        step_samples: number of samples of the last training step, over all ranks.

    Raises:
        UserError: an optimizer or scheduler is unknown, or does not accept an argument.
    """

    selects: ClassVar[tuple[str, Literal["min", "max"]]] = ("val_loss", "min")
    import_paths: ClassVar[tuple[str, ...]] = ("optimizer", "scheduler")
    stated_by_data: ClassVar[tuple[str, ...]] = ()
    registered: ClassVar[Mapping[str, str]] = {}
    start_only: ClassVar[tuple[str, ...]] = ("init_from",)
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
        decay_norms_and_biases: bool = True,
        warmup_steps: int = 0,
        init_from: str | None = None,
        compile: bool = False,
        memory_format: MemoryFormat = "auto",
    ) -> None:
        super().__init__()
        # This also saves the arguments of the subclass. They are logged with the results.
        self.save_hyperparameters(ignore=self._objects(), logger=False)
        self.hparams.update(initial_weights.without(self.start_only, self.hparams))
        self.network = network
        self.initial_weights = initial_weights.load(init_from, network) if init_from else []
        self.optimization = Optimization(
            lr, optimizer, optimizer_args, scheduler, scheduler_args, warmup_steps
        )
        self.optimization.check(self._parameter_groups())
        self.metric_names = ("loss", *(metrics or {}))
        for stage in ("train", "val", "test"):
            # With "disable", the mean includes NaN values.
            setattr(self, f"{stage}_loss", MeanMetric(nan_strategy="disable"))
            for name, metric in (metrics or {}).items():
                setattr(self, f"{stage}_{name}", metric.clone())
        self.step_samples = 0
        self._is_set_up = False
        self._means_are_logged = False
        self._overrides_checkpoint = False
        self._is_unchecked = False
        self._validation_metrics: set[str] = set()  # names logged in the sanity check
        self._has_new_validation = False  # since the last update of the scheduler

    @classmethod
    def _objects(cls) -> list[str]:
        """Return the arguments that are objects, unless a subclass has settings of that name."""
        is_overridden = cls.__init__ is not Task.__init__
        settings = inspect.signature(cls).parameters if is_overridden else {}
        return [name for name in ("network", "metrics") if name not in settings]

    # Methods that a subclass implements or may override

    def step(self, batch: Any, stage: Stage) -> Step:
        """Return the loss, outputs, targets and number of samples of one batch."""
        raise NotImplementedError(f"{type(self).__name__} has no step()")

    def describe(self) -> str:
        """Return a description of the model, for the console."""
        return type(self.network).__name__

    def notes(self) -> list[str]:
        """Return remarks on the settings, which `fit` prints before it trains."""
        return self.initial_weights

    def facts(self) -> dict[str, Any]:
        """Return entries about the network for result.json, as plain data."""
        return {}

    def summary(self) -> list[str]:
        """Return lines to print after the metrics at the end of a run."""
        return []

    def test_report(self) -> str:
        """Return a report on the last test, in addition to its metrics."""
        return "No table of classes: this task has no classes."

    # Metrics

    @classmethod
    def best(cls, validations: Iterable[Mapping[str, float]]) -> Mapping[str, float]:
        """Return the best validation according to `selects`; empty if there is none."""
        name, mode = cls.selects
        best = max if mode == "max" else min
        return best(validations, key=lambda metrics: metrics[name], default={})

    def names(self, stage: Stage) -> list[str]:
        """Return the logged names of the metrics of a stage, the loss first."""
        return [f"{stage}_{name}" for name in self.metric_names]

    def _measured_step(self, batch: Any, stage: Stage) -> Step:
        step = self.step(batch, stage)
        # The loss is not weighted: torchmetrics 1.9 ignores weights with "disable".
        getattr(self, f"{stage}_loss").update(step.loss.detach().expand(step.num_samples))
        outputs, targets = map(_at_least_float32, (step.outputs.detach(), step.targets))
        for name in self.metric_names[1:]:
            getattr(self, f"{stage}_{name}").update(outputs, targets)
        return step

    def _log_means(self, stage: Stage) -> None:
        """Log the metrics over the epoch. Lightning computes and resets them."""
        for name in self.names(stage):
            # The tag `train_loss` is already used for the loss per step.
            tag = f"{name}_epoch" if name == "train_loss" else name
            in_bar = stage != "test" and not name.endswith("_loss")
            self.log(tag, getattr(self, name), on_step=False, on_epoch=True, prog_bar=in_bar)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Convert or move the module, as `nn.Module` does, but only move the metrics.

        Their sums and means would be wrong in 16 bits. torchmetrics ignores `half()` and
        `bfloat16()`, but not `to(dtype)`.
        """
        slots = [
            (parent._modules, name)
            for parent in self.modules()
            for name, child in parent.named_children()
            if isinstance(child, Metric)
        ]
        metrics = [children[name] for children, name in slots]
        for children, name in slots:
            children[name] = None
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            for (children, name), metric in zip(slots, metrics, strict=True):
                children[name] = metric
        device = fn(torch.empty(0, device=self.device)).device
        for metric in metrics:
            assert metric is not None
            metric.to(device)
        return self

    # Training

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs of the network."""
        return self.network(inputs)  # type: ignore[no-any-return]

    def setup(self, stage: str) -> None:
        # Lightning also calls this for the test after fit.
        if self._is_set_up:
            return
        self._is_set_up = True
        layout = self.hparams["memory_format"]
        if layout == "auto":
            # On a CPU, convolutions are faster in channels-last format. Norm layers may
            # be slower: nn.BatchNorm2d takes 2 to 4 times as long if there are few
            # channels.
            on_cpu = self.trainer.strategy.root_device.type == "cpu"
            if on_cpu and recognition.prefers_channels_last(self.network):
                layout = "channels_last"
        if layout == "channels_last":
            channels_last.use_channels_last(self.network)
        if self.hparams["compile"]:
            # This works in place. A wrapper would add `_orig_mod` to the name of each weight.
            self.network.compile()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        step = self._measured_step(batch, "train")
        loss, world_size = step.loss, self.trainer.world_size
        self.step_samples = self._count_samples(batch_idx, step.num_samples)
        if world_size > 1:
            # Gradients are averaged over all ranks, and the shards may differ in size.
            loss = loss * (step.num_samples * world_size / self.step_samples)
        # self.log takes as long as a small layer, so the loss is logged only in the
        # steps that the logger records. Lightning keeps a logged metric until the end
        # of the epoch, so each metric is logged only once per epoch.
        if not self._means_are_logged:
            self._log_means("train")
            self._means_are_logged = True
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.global_step + 1) % every == 0:
            # Lightning reads the metrics of the progress bar after each batch, which blocks
            # the host on a GPU. `MetricsProgressBar` reads the loss only when it is shown.
            in_bar = loss.device.type == "cpu"
            self.log("train_loss", loss, prog_bar=in_bar, sync_dist=True)
        return loss

    def _count_samples(self, batch_idx: int, own: int) -> int:
        """Return the number of samples of a batch over all ranks.

        If the loader has no `size_of`, all shards are assumed to be equal in size.
        """
        size_of = getattr(self.trainer.train_dataloader, "size_of", None)
        return size_of(batch_idx) if size_of else own * self.trainer.world_size

    def on_fit_start(self) -> None:
        # Callbacks such as LearningRateFinder also train, but with other settings.
        self._is_unchecked = True
        # An earlier fit may have ended within an epoch.
        self._means_are_logged = False
        self._reset_train_metrics()

    def on_train_start(self) -> None:
        if self._overrides_checkpoint and self.optimization.scheduler is None:
            self.optimization.override(self.trainer.optimizers[0], self._parameter_groups())
        if self._is_unchecked:
            self.optimization.refuse_other_length(self.trainer)
            monitors.refuse(self.trainer, self.names("val"), self._validation_metrics)
            self._is_unchecked = False
        small_batches.refuse_small_batches(self.trainer, self)

    def on_train_epoch_end(self) -> None:
        # A run that resumed after the last step of an epoch has not logged the metrics
        # of this epoch, so Lightning does not reset them.
        if not self._means_are_logged:
            self._reset_train_metrics()
        self._means_are_logged = False

    def _reset_train_metrics(self) -> None:
        for name in self.names("train"):
            getattr(self, name).reset()

    def configure_optimizers(self) -> Any:
        return self.optimization.configure(self._parameter_groups(), lambda: self.trainer)

    def _parameter_groups(self) -> Groups:
        norms = recognition.layers(self.network).values()
        return parameter_groups(self, norms, self.hparams["decay_norms_and_biases"])

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        # In an epoch without validation, Lightning passes the metric of an earlier one.
        is_new = self._has_new_validation or not monitors.is_of_validation(
            self.optimization.monitor or ""
        )
        if metric is None or is_new:
            super().lr_scheduler_step(scheduler, metric)
            self._has_new_validation = False

    # Evaluation

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._measured_step(batch, "val")

    def on_validation_epoch_end(self) -> None:
        self._log_means("val")

    def on_validation_end(self) -> None:
        if self.trainer.sanity_checking:
            self._validation_metrics = set(self.trainer.callback_metrics)
        else:
            self._has_new_validation = True

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the outputs, for callbacks."""
        return self._measured_step(batch, "test").outputs

    def on_test_epoch_end(self) -> None:
        self._log_means("test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the predictions for `predict`: probabilities (B, C) if there are classes."""
        return self(batch[0])  # type: ignore[no-any-return]

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["has_new_validation"] = self._has_new_validation
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, data_module.DataModule):
            checkpoint[data_module.IDENTITY] = data.identity()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._has_new_validation = checkpoint.get("has_new_validation", True)
        if self._trainer is not None:
            data = self._trainer.datamodule  # type: ignore[attr-defined]
            if isinstance(data, data_module.DataModule):
                data.refuse_other_data(checkpoint)
            # Lightning loads the weights before it converts the module to its
            # precision. Without this conversion, float64 weights would be rounded.
            self._trainer.precision_plugin.convert_module(self)
        if self._trainer is None or self._trainer.state.fn != TrainerFn.FITTING:
            checkpoint["state_dict"] = checkpoints.weights_to_evaluate(checkpoint)
        # A resumed optimizer has the learning rate of its checkpoint. The current settings
        # take precedence, unless there is a scheduler, which continues unchanged.
        before = checkpoint.get("hyper_parameters", {})
        self._overrides_checkpoint = any(
            before.get(name) != self.hparams[name] for name in ("lr", "optimizer_args")
        )


def _at_least_float32(values: Tensor) -> Tensor:
    """Convert 16-bit values to float32, so that the sums of a metric are not rounded to 16 bits."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
