"""Checkpoints as files: written whole or not at all, read without executing anything in them."""

import contextlib
import io
import os
import re
from pathlib import Path
from typing import Any

import fsspec
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from bn_lightning.errors import RunFailed, UserError


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file that is there whole or, after an OSError, not at all: an older one is then as it was."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # Windows cannot open a folder
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's plugin that writes checkpoints: `Trainer(plugins=[WholeCheckpointIO()])`.

    A file is written beside the one that it will replace, flushed to the disk with its folder, and only then renamed:
    whatever happens, there is the old checkpoint or the new one. Lightning's own plugin writes into TMPDIR and moves,
    which from one file system to another is a copy, and flushes nothing.

    Raises:
        RunFailed: from `save_checkpoint`, for a full disk or a folder that is gone; the old checkpoint is still there.
    """

    def __init__(self) -> None:
        self._folders: set[Path] = set()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        if "://" in str(path):  # an object store has its own way to be whole
            return super().save_checkpoint(checkpoint, path, storage_options)
        path = Path(path)
        content = io.BytesIO()
        torch.save(checkpoint, content)
        try:
            if path.parent not in self._folders:  # one that was there and is gone is not made anew
                path.parent.mkdir(parents=True, exist_ok=True)
                self._folders.add(path.parent)
            write_whole(path, content.getbuffer())
        except OSError as error:
            try:
                kept = (
                    f"The one before is whole: {path}"
                    if path.exists()
                    else "There is none from before."
                )
            except OSError:  # the disk itself is gone
                kept = ""
            raise RunFailed(
                f"The checkpoint {path} cannot be written: {error.strerror or error}.\n{kept}\n"
                "When there is room again, go on with what was saved: fit --ckpt_path last, and the same settings"
            ) from error


def load(path: str) -> tuple[str, dict[str, Any]]:
    """Load a checkpoint, from a file or an address, without executing anything in it.

    Returns:
        The path of the file, downloaded where an address was given, and what it holds.

    Raises:
        UserError: no such file, or not a checkpoint of this project.
    """
    try:
        local = fsspec.open_local(f"simplecache::{path}") if "://" in path else path
        checkpoint = torch.load(local, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(
            f"There is no checkpoint {path!r}. A run keeps its own in runs/NAME/N/checkpoints/"
        ) from None
    except IsADirectoryError:
        raise UserError(
            f"{path!r} is a folder. The checkpoint that a run has kept: {Path(path, 'checkpoints', 'best.ckpt')}"
        ) from None
    except Exception as error:  # torch.load has no exception of its own, and what it raises hangs on the file's bytes
        # Of torch's own words only what it found, and not its advice to load the file without this care.
        found = re.search(r"WeightsUnpickler error: ([^\n]*)", str(error))
        reason = found[1] if found else type(error).__name__
        raise UserError(
            f"{path!r} is not a checkpoint that can be loaded safely, and nothing in it was executed.\n    {reason}\n"
            "Give a file that fit wrote: runs/NAME/N/checkpoints/last.ckpt"
        ) from error
    for name in ("state_dict", "hyper_parameters"):
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(name, {}), dict):
            raise UserError(
                f"{path!r} holds no run: its {name!r} is no dict. Give a file that fit wrote."
            )
    if "state_dict" not in checkpoint:
        raise UserError(
            f"{path!r} holds no run: it has no 'state_dict'. Give a file that fit wrote."
        )
    return str(local), checkpoint


def refuse_other_versions(path: str, checkpoint: dict[str, Any]) -> None:
    """Refuse to train on with a checkpoint that lacks what a run needs for that.

    Raises:
        UserError: written by another version of this project, or with the weights alone.
    """
    if not {"train_metrics", "optimizer_states"} <= checkpoint.keys():
        raise UserError(
            f"{path!r} was written by another version of this project, or holds the weights alone: a run cannot go on "
            "with it as it was.\nIt can be tested, validated and predicted with; for training, begin a new run."
        )
