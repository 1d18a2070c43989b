"""The callbacks, plugins and defaults that a run adds to Lightning's Trainer."""

import os
import sys
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from jsonargparse import Namespace
from lightning.pytorch.callbacks import (
    Callback,
    LearningRateMonitor,
    ModelCheckpoint,
    ProgressBar,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.errors import UserError
from bn_lightning.monitoring.figures import ClosingPictures
from bn_lightning.monitoring.norm_monitor import NormMonitor
from bn_lightning.monitoring.progress_bar import MetricsProgressBar
from bn_lightning.norms import recognition
from bn_lightning.norms.sync import LayerSync
from bn_lightning.runs.records import Records
from bn_lightning.training import averaging, checkpoints
from bn_lightning.training.data_module import DataModule
from bn_lightning.training.distributed import DistributedTraining
from bn_lightning.training.resume import ExactResume
from bn_lightning.training.task import Task


@dataclass
class TrainerParts:
    """The callbacks of a run, and the Trainer arguments that override the user's.

    Attributes:
        records: records metrics and times.
        resume: writes last.ckpt; None if no checkpoints are written.
        best: writes best.ckpt; None if no checkpoint is selected.
        callbacks: all callbacks in their order.
        arguments: arguments of the Trainer.
        wants_tensorboard: whether to add a TensorBoard logger as soon as the run has a
            folder.
    """

    records: Records
    resume: ExactResume | None = None
    best: ModelCheckpoint | None = None
    callbacks: list[Callback] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)
    wants_tensorboard: bool = False


def build_parts(
    command: str, config: Namespace, task: Task, data: DataModule, extra: list[Callback]
) -> TrainerParts:
    """Return the parts of a run that are not set by the user.

    Args:
        config: the settings of the command, with callbacks and plugins as objects.
        extra: callbacks of the caller, for example a study.

    Raises:
        UserError: the settings would make records or statistics of the run invalid.
    """
    settings = config.trainer
    own = _as_list(settings.callbacks)
    _refuse_settings(settings)
    if command == "fit":
        _refuse_averaging(task, own)
    parts = TrainerParts(Records())
    parts.callbacks += [parts.records, *extra]
    parts.callbacks += [
        averaging.AverageFromStart(callback)
        for callback in own
        if isinstance(callback, WeightAveraging)
    ]
    if command == "fit":
        _add_checkpoints(parts, config, task, data)
        parts.callbacks.append(DistributedTraining())
        if config.monitor:
            given = {type(callback) for callback in own}
            monitors = (NormMonitor, ClosingPictures)
            parts.callbacks += [monitor() for monitor in monitors if monitor not in given]
    _add_logging(parts, settings, own)
    if settings.enable_model_summary is None:
        # The header of `fit` has the number of parameters.
        parts.arguments["enable_model_summary"] = False
    plugins = [*_as_list(settings.plugins), checkpoints.WholeCheckpointIO()]
    parts.arguments["plugins"] = [*plugins, LayerSync()] if settings.sync_batchnorm else plugins
    parts.arguments |= _processes_of_torchrun(settings)
    return parts


def _as_list(setting: Any) -> list[Any]:
    """Return a setting as a list; a config may also have a single object or null."""
    return setting if isinstance(setting, list) else [setting] if setting else []


def _refuse_settings(settings: Namespace) -> None:
    if settings.barebones:
        raise UserError(
            "--trainer.barebones true cannot be used: it disables the metrics that a run "
            "records.\n"
            "To save time, use --trainer.logger false or --trainer.enable_checkpointing false."
        )
    if str(settings.strategy).endswith(("_spawn", "_fork", "_notebook")):
        raise UserError(
            f"--trainer.strategy {settings.strategy} cannot be used: its processes end after "
            "training, and the metrics in their memory are lost.\n"
            "Use --trainer.strategy ddp instead."
        )


def _refuse_averaging(task: Task, callbacks: list[Any]) -> None:
    """Refuse Lightning's callback if it would not update running statistics for the average."""
    if StochasticWeightAveraging not in map(type, callbacks):
        return
    layers = recognition.with_statistics(task).values()
    ignored = [layer for layer in layers if not isinstance(layer, _BatchNorm)]
    # The callback of this project checks by itself what it does not support.
    ours = averaging.StochasticWeightAveraging
    if ignored and ours.pl_module_contains_batch_norm(task):
        raise UserError(
            "Lightning's StochasticWeightAveraging does not recognize norm layers such as "
            f"{type(ignored[0]).__name__}: their running statistics would not be updated for the "
            "averaged weights.\n"
            "Use the class of this project, which has the same arguments: "
            "--trainer.callbacks+=bn_lightning.StochasticWeightAveraging"
        )


def _add_checkpoints(parts: TrainerParts, config: Namespace, task: Task, data: DataModule) -> None:
    settings = config.trainer
    if settings.enable_checkpointing is False or settings.fast_dev_run:
        return
    every, seed = config.checkpoint.every_n_train_steps, config.seed_everything
    parts.resume = ExactResume(every, seed=seed, max_time=settings.max_time)
    parts.callbacks.append(parts.resume)
    # ExactResume applies the time limit. After Lightning's timer, a resumed run would
    # skip the rest of the epoch.
    parts.arguments["max_time"] = None
    if settings.limit_val_batches != 0 and not data.validates_on_test_set:
        monitor, mode = task.selects
        parts.best = ModelCheckpoint(
            filename="best",
            monitor=monitor,
            mode=mode,
            save_last=False,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        parts.callbacks.append(parts.best)


def _add_logging(parts: TrainerParts, settings: Namespace, own: list[Any]) -> None:
    dry = bool(settings.fast_dev_run)
    if settings.logger is not False and not dry:
        parts.callbacks.append(LearningRateMonitor("step"))
    by_default = settings.logger in (None, True)
    parts.wants_tensorboard = by_default and not dry
    if by_default:
        # The TensorBoard logger is added when the run has a folder.
        parts.arguments["logger"] = False
    shows_progress = settings.enable_progress_bar
    if shows_progress is None:
        # In a file, each refresh of the bar would be a new line.
        shows_progress = sys.stdout.isatty()
    parts.arguments["enable_progress_bar"] = shows_progress
    if shows_progress and not any(isinstance(callback, ProgressBar) for callback in own):
        parts.callbacks.append(MetricsProgressBar())


def _processes_of_torchrun(settings: Namespace) -> dict[str, Any]:
    """Return the number of nodes and devices, if torchrun started this process."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return {}
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    arguments: dict[str, Any] = {"num_nodes": int(os.environ["WORLD_SIZE"]) // local}
    if settings.devices == "auto":
        arguments["devices"] = local
    return arguments
