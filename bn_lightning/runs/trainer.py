"""What a run adds to Lightning's Trainer: callbacks, plugins and defaults."""

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
class Equipment:
    """The callbacks of a run, and arguments of the Trainer that replace those of the user.

    Attributes:
        records: metrics and times.
        resume: writes last.ckpt; None where nothing is saved.
        best: writes best.ckpt; None where no checkpoint is selected.
        callbacks: all callbacks, in their order.
        arguments: of the Trainer.
        wants_tensorboard: whether TensorBoard is to log, once the run has a folder.
    """

    records: Records
    resume: ExactResume | None = None
    best: ModelCheckpoint | None = None
    callbacks: list[Callback] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)
    wants_tensorboard: bool = False


def equip(
    command: str, config: Namespace, task: Task, data: DataModule, extra: list[Callback]
) -> Equipment:
    """Return what a run needs beside what the user has set.

    Args:
        config: the settings of the sub-command, with callbacks and plugins as objects.
        extra: callbacks of a caller, such as a study.

    Raises:
        UserError: settings that take away what a run leaves behind.
    """
    settings = config.trainer
    own = _as_list(settings.callbacks)
    _refuse_settings(settings)
    if command == "fit":
        _refuse_averaging(task, own)
    found = Equipment(Records())
    found.callbacks += [found.records, *extra]
    if command == "fit":
        _add_checkpoints(found, config, task, data)
        found.callbacks.append(DistributedTraining())
        if config.monitor:
            given = {type(callback) for callback in own}
            monitors = (NormMonitor, ClosingPictures)
            found.callbacks += [monitor() for monitor in monitors if monitor not in given]
    _add_logging(found, settings, own)
    if settings.enable_model_summary is None:
        found.arguments["enable_model_summary"] = False  # `fit` prints the number of parameters
    plugins = [*_as_list(settings.plugins), checkpoints.WholeCheckpointIO()]
    found.arguments["plugins"] = [*plugins, LayerSync()] if settings.sync_batchnorm else plugins
    found.arguments |= _processes_of_torchrun(settings)
    return found


def _as_list(setting: Any) -> list[Any]:
    """Return several, none, or one that a config names without a list."""
    return setting if isinstance(setting, list) else [setting] if setting else []


def _refuse_settings(settings: Namespace) -> None:
    if settings.barebones:
        raise UserError(
            "--trainer.barebones true switches off the metrics, and with them everything that a "
            "run leaves and prints.\n"
            "What is costly can be left out by itself: --trainer.logger false "
            "--trainer.enable_checkpointing false"
        )
    if str(settings.strategy).endswith(("_spawn", "_fork", "_notebook")):
        raise UserError(
            f"--trainer.strategy {settings.strategy} trains in processes that lose their records "
            "when they end.\n"
            "--trainer.strategy ddp does the same with processes that stay to the end."
        )


def _refuse_averaging(task: Task, callbacks: list[Any]) -> None:
    """Refuse Lightning's callback where averaged weights would keep stale running statistics."""
    if StochasticWeightAveraging not in map(type, callbacks):
        return
    layers = recognition.with_statistics(task).values()
    unseen = [layer for layer in layers if not isinstance(layer, _BatchNorm)]
    # What the callback of this project cannot do either, it refuses by itself.
    ours = averaging.StochasticWeightAveraging
    if unseen and ours.pl_module_contains_batch_norm(task):
        raise UserError(
            "Lightning's StochasticWeightAveraging does not see norm layers such as "
            f"{type(unseen[0]).__name__}: the averaged weights would keep the running statistics "
            "of other weights.\n"
            "With the same arguments, one that sees them: "
            "--trainer.callbacks+=bn_lightning.StochasticWeightAveraging"
        )


def _add_checkpoints(found: Equipment, config: Namespace, task: Task, data: DataModule) -> None:
    settings = config.trainer
    if settings.enable_checkpointing is False or settings.fast_dev_run:
        return
    every, seed = config.checkpoint.every_n_train_steps, config.seed_everything
    found.resume = ExactResume(every, seed=seed, max_time=settings.max_time)
    found.callbacks.append(found.resume)
    # Lightning's timer would end an epoch in the middle.
    found.arguments["max_time"] = None
    if settings.limit_val_batches != 0 and not data.validates_on_test_set:
        monitor, mode = task.selects
        found.best = ModelCheckpoint(
            filename="best",
            monitor=monitor,
            mode=mode,
            save_last=False,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        found.callbacks.append(found.best)


def _add_logging(found: Equipment, settings: Namespace, own: list[Any]) -> None:
    dry = bool(settings.fast_dev_run)
    if settings.logger is not False and not dry:
        found.callbacks.append(LearningRateMonitor("step"))
    by_default = settings.logger in (None, True)
    found.wants_tensorboard = by_default and not dry
    if by_default:
        found.arguments["logger"] = False  # until the run has a folder
    shows_progress = settings.enable_progress_bar
    if shows_progress is None:
        shows_progress = sys.stdout.isatty()  # in a file each refresh would be a line
    found.arguments["enable_progress_bar"] = shows_progress
    if shows_progress and not any(isinstance(callback, ProgressBar) for callback in own):
        found.callbacks.append(MetricsProgressBar())


def _processes_of_torchrun(settings: Namespace) -> dict[str, Any]:
    """Return the number of processes, where torchrun has started this one."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return {}
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    found: dict[str, Any] = {"num_nodes": int(os.environ["WORLD_SIZE"]) // local}
    if settings.devices == "auto":
        found["devices"] = local
    return found
