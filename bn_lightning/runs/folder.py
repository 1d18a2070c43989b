"""The folders of runs, `runs/NAME/NUMBER`: creation, checkpoints, and changes of settings."""

import contextlib
import itertools
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import yaml

from bn_lightning import terminal
from bn_lightning.errors import UserError
from bn_lightning.training import checkpoints

# Settings that locate the checkpoint and the folder of a run. They are not recorded as
# changes.
NOT_RECORDED = ("config", "ckpt_path", "resume", "name", "trainer.default_root_dir")


def new_folder(parent: Path) -> Path:
    """Create `parent/N` with the next free number N, and return it.

    Numbers start at 0. Runs that start at the same time get different folders.
    """
    parent.mkdir(parents=True, exist_ok=True)
    numbers = [int(path.name) for path in parent.iterdir() if path.name.isdecimal()]
    number = max(numbers, default=-1) + 1
    while True:
        try:
            folder = parent / str(number)
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1


class RunFolder:
    """The folder of a new or resumed run, locked for this process.

    Attributes:
        path: the folder.
        resuming: whether the folder belongs to an earlier run that is resumed.
        changed: settings that differ from those of the earlier run: {name: (before,
            now)}.

    Raises:
        UserError: another process has locked the folder.
        OSError: the folder is not writable.
    """

    def __init__(self, path: Path, resuming: bool) -> None:
        self.path = path
        self.resuming = resuming
        self.changed: dict[str, tuple[Any, Any]] = {}
        self._lock = filelock.FileLock(path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise UserError(
                f"The run in {str(path)!r} is in use by another process. Wait until that process "
                "ends."
            ) from None
        except OSError:
            if not resuming:
                shutil.rmtree(path, ignore_errors=True)
            raise
        # A process that was killed may have left temporary files. No other process
        # writes here.
        for file in path.rglob(".*.tmp"):
            file.unlink()
        self._files_before = set(path.iterdir())

    def save_changes(self, settings: dict[str, Any], defaults: dict[str, Any]) -> None:
        """Write the settings that differ from those of the earlier run to `resumed-N.yaml`.

        A setting that did not exist when the run started is assumed to have had its
        default.
        """
        self.changed = changes(self.path, settings, defaults)
        if self.changed:
            record_changes(self.path, self.changed)

    def remove_new_files(self) -> None:
        """Remove a new folder, or the files that were added to the folder of a resumed run."""
        if not self.resuming:
            shutil.rmtree(self.path, ignore_errors=True)
            return
        with contextlib.suppress(OSError):
            for file in set(self.path.iterdir()) - self._files_before:
                file.unlink()

    def release(self) -> None:
        """Unlock the folder for other processes."""
        self._lock.release()


def is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


def find_newest_checkpoint(parent: Path, warn: bool = True) -> tuple[str, dict[str, Any]] | None:
    """Return path and content of the checkpoint from which the newest run is resumed.

    This is `last.ckpt` of the newest run in `parent`. If it is corrupt, the other
    checkpoints of this run are tried, and then those of older runs.

    Args:
        warn: whether to print a warning for each corrupt checkpoint.

    Returns:
        None if there is no intact checkpoint.
    """
    runs = [list(_checkpoints_of(run)) for run in parent.glob("*") if is_run(run)]
    newest_first = sorted(
        filter(None, runs),
        key=lambda files: max(path.stat().st_mtime for path in files),
        reverse=True,
    )
    return _first_intact(itertools.chain.from_iterable(newest_first), warn)


def checkpoint_to_resume(folder: Path, warn: bool = True) -> tuple[str, dict[str, Any]]:
    """Return path and content of the checkpoint from which the run in `folder` is resumed.

    Raises:
        UserError: `folder` is not the folder of a run, or has no intact checkpoint.
    """
    if not is_run(folder):
        raise UserError(
            f"{str(folder)!r} is not the folder of a run: it has no config.yaml.\n"
            "Use the run folder that fit has printed, for example --resume runs/NAME/0"
        )
    found = _first_intact(_checkpoints_of(folder), warn)
    if found is None:
        raise UserError(
            f"The run in {str(folder)!r} cannot be resumed: {folder / 'checkpoints'} has no intact "
            f"checkpoint.\nStart the run again: fit --config {folder / 'config.yaml'}"
        )
    return found


def _checkpoints_of(folder: Path) -> Iterator[Path]:
    """Yield `last.ckpt` first, then the others from new to old."""
    files = (folder / "checkpoints").glob("*.ckpt")
    yield from sorted(files, key=lambda path: (path.name != "last.ckpt", -path.stat().st_mtime))


def _first_intact(paths: Iterator[Path], warn: bool) -> tuple[str, dict[str, Any]] | None:
    for path in paths:
        try:
            return checkpoints.load(str(path))
        except UserError as error:
            if warn:
                # The second line of a message has the cause, if there is one.
                reason = str(error).splitlines()[:2][-1].strip()
                message = f"WARNING: {path} is corrupt and is skipped: {reason}"
                print(terminal.printable(message), file=sys.stderr, flush=True)
    return None


def settings_files(folder: Path) -> list[Path]:
    """Return `config.yaml`, then the `resumed-N.yaml` in their order."""
    resumed = folder.glob("resumed-*.yaml")
    numbered = sorted(resumed, key=lambda path: int(path.stem.removeprefix("resumed-")))
    return [folder / "config.yaml", *numbered]


def changes(
    folder: Path, settings: dict[str, Any], defaults: dict[str, Any] | None = None
) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ from those of the run in `folder`: {name: (before, now)}."""
    before = flat(defaults or {})
    for file in settings_files(folder):
        before |= flat(yaml.safe_load(file.read_text(encoding="utf-8")) or {})
    return {
        name: (before.get(name), now)
        for name, now in flat(settings).items()
        if before.get(name) != now and name not in NOT_RECORDED
    }


def record_changes(folder: Path, changed: dict[str, tuple[Any, Any]]) -> Path:
    """Write the next `resumed-N.yaml`, which is valid as a --config of fit, and return its path."""
    file = folder / f"resumed-{len(settings_files(folder))}.yaml"
    sections = nested({name: now for name, (_, now) in changed.items()})
    file.write_text(yaml.safe_dump(sections, sort_keys=False), encoding="utf-8")
    return file


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Flatten one level of sections: {"model": {"lr": 1}} becomes {"model.lr": 1}."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    return flat


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Convert dotted names to nested sections, and merge sections of the same name.

    Sections in `flat` are copied, not changed.
    """
    sections: dict[str, Any] = {}
    for name, value in flat.items():
        *path, key = name.split(".")
        inner = sections
        for section in path:
            inner[section] = dict(inner.get(section) or {})
            inner = inner[section]
        inner[key] = value
    return sections
