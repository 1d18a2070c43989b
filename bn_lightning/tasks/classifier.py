"""The LightningModule: a network with its loss, metrics, optimizer and learning-rate schedule."""

import importlib
import inspect
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from bn_lightning.errors import UserError
from bn_lightning.networks.lenet import Activation, LeNet, Pooling

NUM_CLASSES = 10

Batch = tuple[Tensor, Tensor]


class Classifier(pl.LightningModule):
    """LeNet trained by cross-entropy. Batches are images (B, 1, 28, 28) and labels (B,).

    All arguments are plain data, so a checkpoint that holds them loads with `weights_only=True`.

    Args:
        norm: the normalization layer: `custom` (from scratch), `builtin` (torch's), `article` (the tutorial's),
            `renorm` (batch renormalization), `group` (group norm), `none`, or an import path, `package.module.Name`,
            called as `norm(num_features=..., num_dims=2|4, **norm_args)`.
        norm_args: further arguments of the norm, such as `--model.norm_args.eps 1e-3`.
        activation: the activation function behind each norm.
        pooling: the mean or the maximum of each 2x2 square.
        lr: learning rate; of OneCycleLR the peak.
        optimizer: a class of `torch.optim`, or an import path.
        optimizer_args: further arguments of the optimizer, such as `--model.optimizer_args.momentum 0.9`.
        scheduler: a class of `torch.optim.lr_scheduler`, or an import path; None keeps the learning rate. One that
            needs the length of the run (OneCycleLR, CosineAnnealingLR) is told the number of steps and moves at each;
            others move at the end of each epoch.
        scheduler_args: further arguments of the scheduler, such as `--model.scheduler_args.pct_start 0.2`.
        label_smoothing: of the loss that is trained on: the share of each label that is spread over all classes
            (Szegedy et al. 2016, section 7). Losses of validation and test are without it.
        compile: run the network through `torch.compile`, for fit, test and predict. Checkpoints are the same.

    Attributes:
        confusion: of the last test, int64 (10, 10): images by class, rows, and by the class that they were taken for.

    Raises:
        UserError: an unknown norm, optimizer or scheduler, or arguments that it does not take.
    """

    def __init__(
        self,
        norm: str = "custom",
        norm_args: dict[str, Any] | None = None,
        activation: Activation = "sigmoid",
        pooling: Pooling = "avg",
        lr: float = 1.0,
        optimizer: str = "SGD",
        optimizer_args: dict[str, Any] | None = None,
        scheduler: str | None = None,
        scheduler_args: dict[str, Any] | None = None,
        label_smoothing: float = 0.0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # the logger gets them with the results, at the end of the run
        self.network = LeNet(norm, norm_args, activation, pooling)
        self._is_set_up = False
        if not 0 <= label_smoothing < 1:
            raise UserError(
                f"label_smoothing is {label_smoothing}; it must be from 0 to less than 1: --model.label_smoothing 0.05"
            )
        self.lr = lr
        self.optimizer_class = _find_class(optimizer, "torch.optim", "optimizer")
        self.optimizer_args = dict(optimizer_args or {})
        self.scheduler_class: Any = None
        if scheduler is not None:
            self.scheduler_class = _find_class(scheduler, "torch.optim.lr_scheduler", "scheduler")
        self.scheduler_args = dict(scheduler_args or {})
        self._try_optimizer()
        for stage in ("train", "val", "test"):
            setattr(self, f"{stage}_loss", MeanMetric(nan_strategy="disable"))  # a NaN must show
            # Labels are checked once, when the data are read; to check each batch again costs more than to count.
            setattr(self, f"{stage}_acc", MulticlassAccuracy(NUM_CLASSES, average="micro", validate_args=False))
        self._means_are_logged = False  # of the train epoch that runs
        self._typed_over_checkpoint = False
        self._restored_metrics: dict[str, Tensor] = {}
        self.test_confusion = MulticlassConfusionMatrix(NUM_CLASSES, validate_args=False)
        self.confusion = torch.zeros(NUM_CLASSES, NUM_CLASSES, dtype=torch.long)

    def setup(self, stage: str) -> None:
        if self._is_set_up:  # Lightning calls again for the test behind fit
            return
        self._is_set_up = True
        # On a CPU convolutions are faster in channels-last order, and so is the norm from scratch; torch's is 2 to 4
        # times slower there with LeNet's few channels, and of a norm by import path nothing is known.
        if self.trainer.strategy.root_device.type == "cpu" and self.hparams["norm"] in ("custom", "none"):
            self.network.to(memory_format=torch.channels_last)
        if self.hparams["compile"]:
            self.network.compile()  # in place: wrapped, each weight's name would begin with _orig_mod

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 10) of images (B, 1, 28, 28)."""
        return self.network(images)  # type: ignore[no-any-return]

    def _step(self, batch: Batch, stage: str) -> tuple[Tensor, Tensor]:
        """Loss and logits of a batch, counted in the stage's metrics."""
        images, labels = batch
        logits = self(images)
        smoothing = self.hparams["label_smoothing"] if stage == "train" else 0.0
        logits32 = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits32, labels, label_smoothing=smoothing)
        # Once for each image, in the place of a weight: with nan_strategy="disable" torchmetrics 1.9 forgets weights.
        getattr(self, f"{stage}_loss").update(loss.detach().expand(len(labels)))
        getattr(self, f"{stage}_acc").update(logits.detach(), labels)
        return loss, logits

    def _log_means(self, stage: str) -> None:
        """Log the means over the epoch's images; Lightning computes and resets the metrics, on all processes."""
        suffix = "_epoch" if stage == "train" else ""  # train_loss itself is the curve over steps
        self.log(f"{stage}_loss{suffix}", getattr(self, f"{stage}_loss"), on_step=False, on_epoch=True)
        self.log(f"{stage}_acc", getattr(self, f"{stage}_acc"), on_step=False, on_epoch=True, prog_bar=stage != "test")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, _ = self._step(batch, "train")
        if self.trainer.world_size > 1:
            # What is taken is the mean of the gradients of all processes, and their slices may differ by an image.
            loss = loss * (len(batch[1]) * self.trainer.world_size / global_size(self.trainer, batch, batch_idx))
        # self.log costs as much as a small layer, so it is called only where something comes of it: for the means once
        # an epoch, since Lightning keeps the metrics themselves, and for the loss where the logger will take it.
        if not self._means_are_logged:
            self._log_means("train")
            self._means_are_logged = True
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.global_step + 1) % every == 0:
            self.log("train_loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def on_train_start(self) -> None:
        if self._typed_over_checkpoint and self.scheduler_class is None:
            for group in self.trainer.optimizers[0].param_groups:
                group.update(lr=self.lr, **self.optimizer_args)
        self._refuse_another_schedule()
        for name, by_process in self._restored_metrics.items():
            metric, state = name.split(".")
            if len(by_process) == self.trainer.world_size:
                mine = by_process[self.global_rank]
            else:  # sums, whoever has them
                mine = by_process.sum(0) if self.global_rank == 0 else torch.zeros_like(by_process[0])
            setattr(getattr(self, metric), state, mine.to(self.device))
        self._restored_metrics = {}

    def _refuse_another_schedule(self) -> None:
        for name in self._lengths_wanted() if self.scheduler_class else []:
            steps = self.trainer.estimated_stepping_batches
            for config in self.trainer.lr_scheduler_configs:
                planned = getattr(config.scheduler, name, steps)
                if planned != steps:
                    raise UserError(
                        f"{self.scheduler_class.__name__} was planned for {planned:,} steps when the run began, and is "
                        f"now to have {steps:,}: the steps that are done would have been others.\n"
                        "Go on with the same --trainer.max_epochs or --trainer.max_steps, or begin a new run."
                    )

    def on_train_epoch_end(self) -> None:
        if not self._means_are_logged:  # resumed behind the last step of the epoch: Lightning does not know of them
            for metric in ("train_loss", "train_acc"):
                getattr(self, metric).reset()
        self._means_are_logged = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # The train metrics of an epoch that is under way, of each process its own: in another order sums are others.
        checkpoint["train_metrics"] = {
            f"{metric}.{state}": self._of_all_processes(value)
            for metric in ("train_loss", "train_acc")
            for state, value in getattr(self, metric).metric_state.items()
        }

    def _of_all_processes(self, value: Tensor) -> Tensor:
        """(processes, ...): the value that each of them has."""
        values = [value]
        if self.trainer.world_size > 1:
            values = [torch.empty_like(value) for _ in range(self.trainer.world_size)]
            dist.all_gather(values, value.contiguous())
        return torch.stack(values).cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._restored_metrics = checkpoint.get("train_metrics", {})
        if self._trainer is not None:
            # Lightning loads the weights before it gives them their precision: float64 would be rounded on its way.
            self._trainer.precision_plugin.convert_module(self)
        # A resumed optimizer comes with the learning rate of its checkpoint; what was typed is stronger. With a
        # scheduler the schedule goes on as it was.
        before = checkpoint.get("hyper_parameters", {})
        self._typed_over_checkpoint = any(before.get(n) != self.hparams[n] for n in ("lr", "optimizer_args"))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._step(batch, "val")

    def on_validation_epoch_end(self) -> None:
        self._log_means("val")

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Logits (B, 10), for callbacks."""
        _, logits = self._step(batch, "test")
        self.test_confusion.update(logits, batch[1])
        return logits

    def on_test_epoch_end(self) -> None:
        self._log_means("test")
        names = getattr(self.trainer.datamodule, "classes", range(NUM_CLASSES))  # type: ignore[attr-defined]
        counts = self.test_confusion.compute()
        self.test_confusion.reset()
        self.confusion = counts.cpu()
        for name, accuracy in zip(names, counts.diag() / counts.sum(1), strict=True):
            self.log(f"test_acc_of/{name}", accuracy, sync_dist=True)  # the same on all processes already

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Probabilities (B, 10)."""
        return self(batch[0]).float().softmax(1)  # type: ignore[no-any-return]

    def _try_optimizer(self) -> None:
        """Build optimizer and scheduler once for nothing, so that a wrong argument shows before anything is begun."""
        try:
            tried = self.optimizer_class(self.network.parameters(), lr=self.lr, **self.optimizer_args)
        except (TypeError, ValueError) as error:
            raise _cannot_build(self.optimizer_class, {"lr": self.lr, **self.optimizer_args}, error) from error
        if self.scheduler_class is not None:
            arguments = self._scheduler_arguments(steps=1_000)
            try:
                self.scheduler_class(tried, **arguments)
            except (TypeError, ValueError) as error:
                raise _cannot_build(self.scheduler_class, arguments, error) from error

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer_class(self.parameters(), lr=self.lr, **self.optimizer_args)
        if self.scheduler_class is None:
            return optimizer
        lengths = self._lengths_wanted()
        steps = self.trainer.estimated_stepping_batches if lengths else 0
        if steps == float("inf"):
            raise UserError(
                f"{self.scheduler_class.__name__} needs to know how long the run is: give --trainer.max_epochs or "
                f"--trainer.max_steps, or its own length: --model.scheduler_args.{lengths[0]}"
            )
        scheduler = self.scheduler_class(optimizer, **self._scheduler_arguments(int(steps)))
        wants = inspect.signature(self.scheduler_class).parameters
        # What counts steps moves at every step: it was told so here, or has no other unit (OneCycleLR, CyclicLR).
        config = {"scheduler": scheduler, "interval": "step" if lengths or "max_lr" in wants else "epoch"}
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            config["monitor"] = "val_loss"
        return {"optimizer": optimizer, "lr_scheduler": config}

    def _lengths_wanted(self) -> list[str]:
        """The scheduler's arguments that state the length of the run, where the user has not stated it."""
        wants, given = inspect.signature(self.scheduler_class).parameters, self.scheduler_args.keys()
        return [name for name in ("total_steps", "T_max") if name in wants and not given & {name, "epochs"}]

    def _scheduler_arguments(self, steps: int) -> dict[str, Any]:
        arguments: dict[str, Any] = dict.fromkeys(self._lengths_wanted(), steps)
        if "max_lr" in inspect.signature(self.scheduler_class).parameters:
            arguments["max_lr"] = self.lr
        return arguments | self.scheduler_args


def global_size(trainer: pl.Trainer, batch: Batch, batch_idx: int) -> int:
    """Images of a train batch over all processes; of a loader that does not say, all slices are taken to be equal."""
    size_of = getattr(trainer.train_dataloader, "size_of", None)
    return size_of(batch_idx) if size_of else len(batch[1]) * trainer.world_size


def _find_class(name: str, home: str, kind: str) -> Any:
    """The class of that name in the module `home`, or at that import path."""
    module_name, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name or home), attribute)
    except (ImportError, AttributeError) as error:
        module = importlib.import_module(home)
        known = [n for n, value in vars(module).items() if inspect.isclass(value) and value.__module__.startswith(home)]
        known = sorted(n for n in known if not n.startswith("_") and n not in ("Optimizer", "LRScheduler"))
        raise UserError(
            f"There is no {kind} {name!r}: {error}.\nThere are {', '.join(known)}, or an import path."
        ) from error
    if not inspect.isclass(found):
        raise UserError(f"The {kind} {name!r} is not a class.")
    return found


def _cannot_build(kind: Any, arguments: dict[str, Any], error: Exception) -> UserError:
    return UserError(
        f"{kind.__name__} cannot be built with {arguments}: {error}.\nIt is {kind.__name__}{inspect.signature(kind)}"
    )
