"""The lines that a run prints before and after training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from bn_lightning.norms import recognition
from bn_lightning.runs import result as results
from bn_lightning.training.data_module import DataModule
from bn_lightning.training.task import Task


def header(trainer: pl.Trainer, task: Task, data: DataModule, folder: Path | None) -> str:
    """Return the first lines of `fit`: the network, the device, the data and the folder."""
    origin = results.validated_on(data)
    validation = "held-out training samples" if origin == "training set" else f"the {origin}"
    parameters = sum(p.numel() for p in task.parameters())
    return (
        f"{task.describe()}, {parameters:,} parameters, on {trainer.strategy.root_device}, "
        f"precision {trainer.precision}, seed {data.seed}\n"
        f"{data.describe()}, validated on {validation}\n"
        f"run folder {folder}"
    )


def notes(trainer: pl.Trainer, task: Task, data: DataModule, sync_batchnorm: bool) -> list[str]:
    """Return remarks on the settings and on how the metrics are computed."""
    lines = [*data.notes(), *task.notes()]
    processes = trainer.world_size
    if processes > 1 and recognition.with_statistics(task.network):
        lines.append(
            f"{processes} processes, norm statistics are synchronized"
            if sync_batchnorm
            else f"{processes} processes: each normalizes its own shard of a batch, and only the "
            "running statistics of rank 0 are saved. To synchronize them: "
            "--trainer.sync_batchnorm true"
        )
    if data.validates_on_test_set:
        logged = " and ".join(task.names("val"))
        lines.append(
            f"no validation samples: {logged} are computed on the test set, and no checkpoint is "
            "selected"
        )
    return lines


def closing(result: Mapping[str, Any], task: Task, folder: Path) -> str:
    """Return the lines of `fit` after training, before the report of the test."""
    shown = ["train_loss", *task.names("train")[1:], *(task.names("test")[1:] or ["test_loss"])]
    metrics = ", ".join(f"{name.replace('_', ' ')} {_number(result[name])}" for name in shown)
    lines = [f"\ntested {result['tested']} of {folder}", metrics]
    name, _ = task.selects
    if result["val_images_from"] == "test set" and result[f"{name}_best"] is not None:
        lines.append(
            f"{name.replace('val_', 'test ', 1)} after each epoch: "
            f"final {_number(result[f'{name}_final'])}, best {_number(result[f'{name}_best'])}, "
            f"mean of the last three {_number(result[f'{name}_mean_of_last_3'])}"
        )
    lines.append(f"{result['images_per_second'] or 0:,.1f} samples/sec on {result['device']}")
    return "\n".join([*lines, *task.summary(), ""])


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def metrics(results: Sequence[Mapping[str, float]]) -> str:
    """Return the metrics of a test or a validation, one per line."""
    return "\n".join(
        f"{name:10} {value:.4f}"
        for values in results
        for name, value in values.items()
        if "/" not in name  # accuracies of single classes
    )
