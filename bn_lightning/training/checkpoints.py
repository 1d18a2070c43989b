"""Checkpoint files: atomic writing, and loading that executes no code from the file."""

import contextlib
import io
import os
import re
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from bn_lightning.errors import RunFailed, UserError

# Names and settings in a file from anyone. Those of 10,000 layers have about 3 MB.
MAX_PICKLE = 4 * 2**20
# In addition to the size of the file. A byte of a pickle can be an object of 200 bytes or
# an array of any size.
MAX_MEMORY = 500 * 2**20
# The key of the precise statistics in the last.ckpt of a finished run, by their names in
# the state dict.
PRECISE_STATISTICS = "precise_statistics"


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file completely, or leave the existing one unchanged.

    The content goes to a temporary file in the same folder, which is flushed to disk
    and renamed. Several processes may write the same file, and the last one wins.

    Raises:
        OSError: the file could not be written; the temporary file is removed.
    """
    # Processes of several machines may share a folder, so a process number is not
    # unique.
    temporary = path.with_name(f".{uuid.uuid4().hex}-{path.name}.tmp")
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
    # The new name must reach the disk too. Windows cannot open a folder.
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint plugin with atomic writes: `Trainer(plugins=[WholeCheckpointIO()])`.

    After a crash or a power loss, the file is either the old checkpoint or the new one.
    Lightning's own plugin writes to TMPDIR and moves the file. Between file systems a
    move is a copy, and nothing is flushed to disk.

    Raises:
        RunFailed: in `save_checkpoint`, if the disk is full or the folder has
            disappeared. The old checkpoint is unchanged.
    """

    def __init__(self) -> None:
        self._folders: set[Path] = set()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        if "://" in str(path):  # object stores write atomically
            return super().save_checkpoint(checkpoint, path, storage_options)
        path = Path(path)
        content = io.BytesIO()
        torch.save(checkpoint, content)
        try:
            # A folder that existed before and has disappeared is not recreated.
            if path.parent not in self._folders:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._folders.add(path.parent)
            write_atomically(path, content.getbuffer())
        except OSError as error:
            raise RunFailed(
                f"The checkpoint {path} cannot be written: {error.strerror or error}.\n"
                f"{_describe_remaining(path)}"
                "Fix the cause, then resume with `fit --ckpt_path last` and the same settings."
            ) from error


def _describe_remaining(path: Path) -> str:
    try:
        exists = path.exists()
    except OSError:  # the disk is unreachable
        return ""
    if exists:
        return f"The previous checkpoint is intact: {path}\n"
    return "There is no previous checkpoint.\n"


def read(path: str, limited: bool = False) -> tuple[str, Any]:
    """Read a file that torch.save has written, or a URL, without executing any code in it.

    Args:
        limited: whether to limit names and settings to `MAX_PICKLE` bytes, and memory to
            the size of the file and `MAX_MEMORY`.

    Returns:
        The path of the local file (a URL is downloaded first), and its content.

    Raises:
        UserError: the file does not exist, or cannot be loaded.
    """
    try:
        local = fsspec.open_local(f"simplecache::{path}") if "://" in path else path
        size = Path(local).stat().st_size
        _refuse_bomb(path, str(local), size, limited)
        with _memory_limit(size + MAX_MEMORY) if limited else contextlib.nullcontext():
            return str(local), torch.load(local, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(
            f"There is no checkpoint {path!r}. The checkpoints of a run are in "
            "runs/NAME/N/checkpoints/."
        ) from None
    except IsADirectoryError:
        raise UserError(
            f"{path!r} is a folder. Use a checkpoint file, for example "
            f"{Path(path, 'checkpoints', 'best.ckpt')}"
        ) from None
    except UserError:
        raise
    # torch.load raises exceptions of many types, depending on the content of the file.
    except Exception as error:
        # Only the reason is shown: torch's message also advises to use
        # weights_only=False.
        found = re.search(r"WeightsUnpickler error: ([^\n]+)", str(error))
        reason = found[1] if found else f"torch.load raised {type(error).__name__}."
        raise UserError(
            f"{path!r} is corrupt or is not a checkpoint that can be loaded safely. "
            f"Nothing in it was executed.\n    {reason}\n"
            "Use a checkpoint that fit has written, for example runs/NAME/N/checkpoints/last.ckpt."
        ) from error


@contextlib.contextmanager
def _memory_limit(additional: int) -> Iterator[None]:
    """Let allocations fail when this process needs so many additional bytes, on Linux."""
    status = Path("/proc/self/status")
    used = re.search(r"VmData:\s*(\d+) kB", status.read_text() if status.exists() else "")
    if used is None:
        yield
        return
    import resource  # other systems do not have this module, or do not enforce the limit

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [int(used[1]) * 1024 + additional, soft, hard]
    lowest = min(limit for limit in limits if limit != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_DATA, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _refuse_bomb(path: str, local: str, size: int, limited: bool) -> None:
    """Refuse a small file that would fill the memory when it is loaded."""
    pickled = size
    if zipfile.is_zipfile(local):
        with zipfile.ZipFile(local) as archive:
            parts = archive.infolist()
        pickled = sum(part.file_size for part in parts if part.filename.endswith(".pkl"))
        unpacked = sum(part.file_size for part in parts)
        # torch.save neither compresses the parts nor lets them overlap.
        if unpacked > size:
            raise UserError(
                f"{path!r} is not a checkpoint that fit has written: it has {size:,} bytes, but "
                f"unpacks to {unpacked:,} bytes. It was not loaded."
            )
    if limited and pickled > MAX_PICKLE:
        raise UserError(
            f"{path!r} was not loaded: its names and settings have {pickled:,} bytes, more than "
            f"{MAX_PICKLE:,}."
        )


def weights_to_evaluate(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state dict in a checkpoint, with its precise statistics if it has them.

    The state dict of `last.ckpt` has the running statistics that training needs.
    """
    return {**checkpoint["state_dict"], **checkpoint.get(PRECISE_STATISTICS, {})}


def load(path: str, limited: bool = False) -> tuple[str, dict[str, Any]]:
    """Load a checkpoint from a file or a URL, like `read`.

    Raises:
        UserError: the file does not exist, or is not a checkpoint of this project.
    """
    local, checkpoint = read(path, limited)
    for name in ("state_dict", "hyper_parameters", PRECISE_STATISTICS):
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(name, {}), dict):
            raise UserError(
                f"{path!r} is not a checkpoint of a run: {name!r} is not a dict. "
                "Use a checkpoint that fit has written."
            )
    if "state_dict" not in checkpoint:
        raise UserError(
            f"{path!r} is not a checkpoint of a run: it has no 'state_dict'. "
            "Use a checkpoint that fit has written."
        )
    return local, checkpoint


def refuse_other_versions(path: str, checkpoint: dict[str, Any]) -> None:
    """Refuse to resume training from a checkpoint that lacks the state of the optimizer.

    Raises:
        UserError: another version of this project wrote it, or it contains only
            weights.
    """
    if "optimizer_states" not in checkpoint:
        raise UserError(
            f"{path!r} was written by another version of this project, or contains only weights. "
            "Training cannot be resumed from it.\n"
            "Use it with test, validate or predict, or start a new run."
        )
