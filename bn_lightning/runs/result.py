"""result.json, the results of a run: assembling, writing and reading."""

import json
import math
import platform
import statistics
import subprocess
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from bn_lightning.errors import UserError
from bn_lightning.runs.records import Records
from bn_lightning.training.checkpoints import write_atomically
from bn_lightning.training.data_module import DataModule
from bn_lightning.training.task import Task

MAX_BYTES = 2**20  # of a result.json; those of this project have a few thousand


def assemble(
    trainer: pl.Trainer, task: Task, data: DataModule, records: Records, tested: str
) -> dict[str, Any]:
    """Return the content of result.json at the end of training, with None as test metrics.

    Training metrics are running means over the last epoch. Validation metrics are those
    of the
    tested weights: the best validation if a checkpoint was selected, otherwise the last
        one.

    Args:
        tested: name of the weights that will be tested.
    """
    identity = data.identity()
    samples, seconds = records.images, records.seconds
    return {
        **_metrics(task, records, tested),
        "images_per_second": samples / seconds if samples else None,
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "seed": data.seed,
        **task.facts(),
        **{f"data_{name}": value for name, value in identity.items() if not _is_dict(value)},
        "device": _device(trainer.strategy.root_device),
        "precision": trainer.precision,
        "processes": trainer.world_size,
        "tested": tested,
        **_selected(task, records),
        "val_images_from": validated_on(data),
        "train_seconds": seconds,
        **{
            f"{name}_{key}": inner
            for name, value in identity.items()
            if _is_dict(value)
            for key, inner in value.items()
        },
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **{name: version(name) for name in ("lightning", "torchmetrics")},
        **_commit(),
    }


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _metrics(task: Task, records: Records, tested: str) -> dict[str, float | None]:
    last_epoch = records.epochs[-1] if records.epochs else {}
    last = records.validations[-1] if records.validations else {}
    validation = best_validation(task, records) if tested == "best.ckpt" else last
    return {
        **{name: last_epoch.get(name) for name in task.names("train")},
        **{name: validation.get(name) for name in task.names("val")},
        **dict.fromkeys(task.names("test")),
    }


def validated_on(data: DataModule) -> str:
    """Return the origin of the validation samples, as in result.json."""
    if data.validates_on_test_set:
        return "test set"
    return "validation set" if data.has_validation_set else "training set"


def _selected(task: Task, records: Records) -> dict[str, float | None]:
    """Return the selecting metric: its last and best value, and the mean of the last three."""
    name, _ = task.selects
    values = [metrics[name] for metrics in records.validations]
    return {
        f"{name}_final": values[-1] if values else None,
        f"{name}_best": best_validation(task, records).get(name),
        f"{name}_mean_of_last_3": statistics.mean(values[-3:]) if values else None,
    }


def best_validation(task: Task, records: Records) -> Mapping[str, float]:
    """Return step and metrics of the best validation; empty if there is none."""
    return task.best(v for v in records.validations if v["step"] > records.best_since)


def _commit() -> dict[str, str]:
    """Return the git commit of this code, with `-dirty` if it has changes; empty outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    here = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):  # no git, or a slow network folder
        return {}
    return {"commit": done.stdout.strip()} if done.returncode == 0 else {}


def to_json(content: Any) -> str:
    """Return JSON in which NaN and infinity are null, because JSON cannot represent them."""
    return "".join(json_chunks(content))


def json_chunks(content: Any) -> Iterator[str]:
    """Yield the parts of `to_json`, which together may be too large for the memory."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: finite(inner) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [finite(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.JSONEncoder(indent=2).iterencode(finite(content))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_atomically(path, f"{to_json(content)}\n".encode())


def read_result(run: Path) -> dict[str, Any]:
    """Return the content of a run's result.json; empty if there is no such file.

    Raises:
        UserError: the file is corrupt, or cannot be read.
    """
    path = run / "result.json"
    try:
        if not path.is_file():
            return {}
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ValueError(f"it has {size:,} bytes")
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, RecursionError, TypeError, ValueError) as error:
        raise UserError(
            f"{str(path)!r} is corrupt: {error}. Remove the file, or repeat the run."
        ) from error
