"""Where runs lie, `runs/NAME/NUMBER`: a new folder, the last run, and what was changed when a run went on."""

import contextlib
import itertools
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import yaml

from bn_lightning.errors import UserError
from bn_lightning.training import checkpoints

# Says where to go on and in which place, not what is computed.
NOT_RECORDED = ("config", "ckpt_path", "resume", "name", "trainer.default_root_dir")


def new_folder(parent: Path) -> Path:
    """Make `parent/N` with the next free number N from 0 on. Two runs at once get two folders."""
    parent.mkdir(parents=True, exist_ok=True)
    number = 1 + max(
        (int(path.name) for path in parent.iterdir() if path.name.isdecimal()), default=-1
    )
    while True:
        try:
            folder = parent / str(number)
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1


class RunFolder:
    """The folder of a run, new or gone on with, in the one process that may write there.

    Attributes:
        path: the folder.
        resuming: whether the run was begun before.
        changed: settings that are others than until now: name, (before, now).

    Raises:
        UserError: another process has it.
        OSError: it cannot be written to.
    """

    def __init__(self, path: Path, resuming: bool) -> None:
        self.path = path
        self.resuming = resuming
        self.changed: dict[str, tuple[Any, Any]] = {}
        self._lock = filelock.FileLock(path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise UserError(f"The run in {str(path)!r} is under way in another process.") from None
        except OSError:
            if not resuming:
                shutil.rmtree(path, ignore_errors=True)
            raise
        self._before = set(path.iterdir())

    def note_changes(self, settings: dict[str, Any], defaults: dict[str, Any]) -> None:
        """Keep what differs from the settings that the run had until now, in `resumed-N.yaml`.

        A setting that was not there yet when the run began had its default.
        """
        self.changed = changes(self.path, settings, defaults)
        if self.changed:
            record_changes(self.path, self.changed)

    def leave_nothing(self) -> None:
        """Of a run that has done nothing, remove the folder, or what was put into one that was there."""
        if not self.resuming:
            shutil.rmtree(self.path, ignore_errors=True)
            return
        with contextlib.suppress(OSError):
            for file in set(self.path.iterdir()) - self._before:
                file.unlink()

    def release(self) -> None:
        """Let other processes have it."""
        self._lock.release()


def is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


def find_last(parent: Path, speaks: bool = True) -> tuple[str, dict[str, Any]] | None:
    """The newest whole checkpoint of the runs `parent/N`, and what it holds; None if there is none.

    Of each run `last.ckpt` comes first, and another only where that is torn; with `speaks` a warning names what is
    passed over.
    """
    runs = [list(_checkpoints_of(run)) for run in parent.glob("*") if is_run(run)]
    runs = sorted(
        filter(None, runs),
        key=lambda files: max(path.stat().st_mtime for path in files),
        reverse=True,
    )
    return _first_whole(itertools.chain.from_iterable(runs), speaks)


def last_of(folder: Path, speaks: bool = True) -> tuple[str, dict[str, Any]]:
    """The checkpoint with which the run in `folder` goes on, and what it holds.

    Raises:
        UserError: no folder of a run, or none of its checkpoints is whole.
    """
    if not is_run(folder):
        raise UserError(
            f"{str(folder)!r} is not the folder of a run: it has no config.yaml. --resume runs/NAME/0"
        )
    found = _first_whole(_checkpoints_of(folder), speaks)
    if found is None:
        raise UserError(
            f"The run in {str(folder)!r} cannot go on: there is no whole checkpoint in {folder / 'checkpoints'}.\n"
            f"Begin it anew: fit --config {folder / 'config.yaml'}"
        )
    return found


def _checkpoints_of(folder: Path) -> Iterator[Path]:
    """`last.ckpt` first, then the others, from new to old."""
    files = (folder / "checkpoints").glob("*.ckpt")
    yield from sorted(files, key=lambda path: (path.name != "last.ckpt", -path.stat().st_mtime))


def _first_whole(paths: Iterator[Path], speaks: bool) -> tuple[str, dict[str, Any]] | None:
    for path in paths:
        try:
            return checkpoints.load(str(path))
        except UserError as error:
            if speaks:
                reason = str(error).splitlines()[1].strip()
                print(
                    f"WARNING: {path} is passed over, it is torn: {reason}",
                    file=sys.stderr,
                    flush=True,
                )
    return None


def settings_files(folder: Path) -> list[Path]:
    """What a run was begun with, and then what was changed each time it went on."""
    return [
        folder / "config.yaml",
        *sorted(folder.glob("resumed-*.yaml"), key=lambda path: int(path.stem[8:])),
    ]


def changes(
    folder: Path, settings: dict[str, Any], defaults: dict[str, Any] | None = None
) -> dict[str, tuple[Any, Any]]:
    """Which settings are others than those that the run in `folder` had until now: name, (before, now)."""
    before = flat(defaults or {})
    for file in settings_files(folder):
        before |= flat(yaml.safe_load(file.read_text(encoding="utf-8")) or {})
    now = flat(settings)
    return {
        n: (before.get(n), now[n]) for n in now if before.get(n) != now[n] and n not in NOT_RECORDED
    }


def record_changes(folder: Path, changed: dict[str, tuple[Any, Any]]) -> Path:
    """Write `resumed-N.yaml`, which fit takes as a --config."""
    file = folder / f"resumed-{len(settings_files(folder))}.yaml"
    file.write_text(
        yaml.safe_dump(nested({name: now for name, (_, now) in changed.items()}), sort_keys=False),
        encoding="utf-8",
    )
    return file


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Sections of settings, such as model and trainer, as names with a point."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    return flat


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Names with points as sections; later ones are put into what earlier ones hold, which is left as it was."""
    sections: dict[str, Any] = {}
    for name, value in flat.items():
        *path, key = name.split(".")
        inner = sections
        for section in path:
            inner[section] = dict(inner.get(section) or {})
            inner = inner[section]
        inner[key] = value
    return sections
