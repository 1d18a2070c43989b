"""The callbacks, plugins and defaults that a run adds to Lightning's Trainer."""

import os
import sys
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from jsonargparse import Namespace
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    ProgressBar,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins import CheckpointIO, TorchSyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.errors import UserError
from bn_lightning.monitoring.figures import ClosingPictures
from bn_lightning.monitoring.norm_monitor import NormMonitor
from bn_lightning.monitoring.progress_bar import MetricsProgressBar
from bn_lightning.norms import recognition
from bn_lightning.norms.sync import LayerSync
from bn_lightning.runs import finders
from bn_lightning.runs.records import Records
from bn_lightning.training import averaging, checkpoints, lightning_internals, monitors
from bn_lightning.training.best_checkpoint import BestCheckpoint
from bn_lightning.training.data_module import DataModule
from bn_lightning.training.distributed import DistributedTraining
from bn_lightning.training.precise_statistics import PreciseStatistics
from bn_lightning.training.resume import ExactResume
from bn_lightning.training.task import Task


@dataclass
class TrainerParts:
    """The callbacks of a run, and the Trainer arguments that override the user's.

    Attributes:
        records: records metrics and times.
        resume: writes last.ckpt; None if no checkpoints are written.
        best: writes best.ckpt; None if no checkpoint is selected.
        found_settings: records what finders find; None without finders.
        skipped: class names of finders that are not used, because a checkpoint is loaded.
        callbacks: all callbacks in their order.
        arguments: arguments of the Trainer.
        wants_tensorboard: whether to add a TensorBoard logger as soon as the run has a
            folder.
    """

    records: Records
    resume: ExactResume | None = None
    best: BestCheckpoint | None = None
    found_settings: finders.FoundSettings | None = None
    skipped: list[str] = field(default_factory=list)
    callbacks: list[Callback] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)
    wants_tensorboard: bool = False


def build_parts(
    command: str,
    config: Namespace,
    task: Task,
    data: DataModule,
    extra: list[Callback],
    starts_anew: bool,
) -> TrainerParts:
    """Return the parts of a run that are not set by the user.

    Args:
        config: the settings of the command, with callbacks and plugins as objects.
        extra: callbacks of the caller, for example a study.
        starts_anew: whether no checkpoint is loaded.

    Raises:
        UserError: the settings would make records or statistics of the run invalid.
    """
    settings = config.trainer
    own = _as_list(settings.callbacks)
    _refuse_settings(settings)
    if command == "fit":
        _refuse_averaging(task, own)
        _refuse_other_checkpoints(own)
        _check_monitors(settings, task, data, [*own, *extra])
    parts = TrainerParts(Records())
    parts.callbacks += [parts.records, *extra]
    parts.callbacks += [
        averaging.AverageFromStart(callback)
        for callback in own
        if isinstance(callback, WeightAveraging)
    ]
    if command == "fit":
        _add_checkpoints(parts, config, task, data)
        _limit_finders(parts, own, starts_anew)
        parts.callbacks.append(DistributedTraining())
        num_batches = config.precise_statistics
        if num_batches and not _has(own, PreciseStatistics):
            parts.callbacks.append(PreciseStatistics(num_batches, seed=config.seed_everything))
        if config.monitor:
            monitors = (NormMonitor, ClosingPictures)
            parts.callbacks += [monitor() for monitor in monitors if not _has(own, monitor)]
    _add_logging(parts, settings, own)
    if settings.enable_model_summary is None:
        # The header of `fit` has the number of parameters.
        parts.arguments["enable_model_summary"] = False
    plugins = _as_list(settings.plugins)
    if not _has(plugins, CheckpointIO):
        plugins = [*plugins, checkpoints.WholeCheckpointIO()]
    if settings.sync_batchnorm and not _has(plugins, TorchSyncBatchNorm):
        plugins = [*plugins, LayerSync()]
    parts.arguments["plugins"] = plugins
    parts.arguments |= _processes_of_torchrun(settings)
    return parts


def _as_list(setting: Any) -> list[Any]:
    """Return a setting as a list; a config may also have a single object or null."""
    return setting if isinstance(setting, list) else [setting] if setting else []


def _has(given: list[Any], kind: type) -> bool:
    """Return whether the user has given an object of a class, which then replaces the default."""
    return any(isinstance(value, kind) for value in given)


def _refuse_settings(settings: Namespace) -> None:
    if settings.barebones:
        raise UserError(
            "--trainer.barebones true cannot be used: it disables the metrics that a run "
            "records.\n"
            "To save time, use --trainer.logger false or --trainer.enable_checkpointing false."
        )
    # Lightning divides by these numbers without checking them.
    for name in ("accumulate_grad_batches", "check_val_every_n_epoch", "val_check_interval"):
        value = settings[name]
        if isinstance(value, int | float) and value <= 0:
            raise UserError(
                f"--trainer.{name} is {value}; it must be above 0.\n"
                "To train without validation, use --trainer.limit_val_batches 0."
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


def _refuse_other_checkpoints(callbacks: list[Any]) -> None:
    """Refuse callbacks that would write the same files as the run."""
    if _has(callbacks, ExactResume):
        raise UserError(
            "ExactResume is a part of every run, so it cannot be added as a callback.\n"
            "Remove it. Its settings are --checkpoint.every_n_train_steps, --seed_everything and "
            "--trainer.max_time."
        )
    for callback in callbacks:
        if not isinstance(callback, ModelCheckpoint) or callback.dirpath is not None:
            continue
        overwrites_last = callback.save_last and not callback._enable_version_counter
        if callback.filename in ("best", "last") or overwrites_last:
            name = "last" if overwrites_last else callback.filename
            raise UserError(
                f"A ModelCheckpoint would write {name}.ckpt to the run's folder, which has a file "
                f"{name}.ckpt of its own.\n"
                "Choose another `filename`, or another folder with `dirpath`."
            )


def _check_monitors(
    settings: Namespace, task: Task, data: DataModule, callbacks: list[Any]
) -> None:
    """Refuse unusable monitors that are known before the run starts; `Task` finds the others."""
    for callback in callbacks:
        if isinstance(callback, EarlyStopping) and monitors.is_of_validation(callback.monitor):
            lightning_internals.check_after_validation(callback)
    found = monitors.of_callbacks(callbacks)
    if task.optimization.monitor is not None:
        found.append((task.optimization.scheduler.__name__, task.optimization.monitor))
    monitors.refuse_unusable(
        found,
        task.names("val"),
        validates=settings.limit_val_batches != 0,
        on_test_set=data.validates_on_test_set,
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
        parts.best = BestCheckpoint(monitor, mode)
        parts.callbacks.append(parts.best)


def _limit_finders(parts: TrainerParts, own: list[Any], starts_anew: bool) -> None:
    """Let finders search only if no checkpoint is loaded."""
    found = finders.in_callbacks(own)
    if found and starts_anew:
        parts.found_settings = finders.FoundSettings()
        parts.callbacks.append(parts.found_settings)
    elif found:
        parts.skipped = [type(callback).__name__ for callback in found]
        parts.arguments["callbacks"] = [callback for callback in own if callback not in found]


def _add_logging(parts: TrainerParts, settings: Namespace, own: list[Any]) -> None:
    dry = bool(settings.fast_dev_run)
    if settings.logger is not False and not dry and not _has(own, LearningRateMonitor):
        parts.callbacks.append(LearningRateMonitor("step"))
    by_default = settings.logger in (None, True)
    parts.wants_tensorboard = by_default and not dry
    if by_default:
        # The TensorBoard logger is added when the run has a folder.
        parts.arguments["logger"] = False
    shows_progress = settings.enable_progress_bar
    has_own_bar = _has(own, ProgressBar)
    if shows_progress is None:
        # In a file, each refresh of the bar would be a new line.
        shows_progress = has_own_bar or sys.stdout.isatty()
    parts.arguments["enable_progress_bar"] = shows_progress
    if shows_progress and not has_own_bar:
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
