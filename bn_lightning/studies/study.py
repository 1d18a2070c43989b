"""Many runs under one name: what they have in common, where each lies, and how far they all are."""

import json
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import filelock
import yaml
from tqdm import tqdm

from bn_lightning.data.fashion_mnist import FashionMNIST
from bn_lightning.errors import UserError
from bn_lightning.runs import folder, records, run
from bn_lightning.studies import workers

# Weaker than what is typed: what the norms do is for looking at single runs, and several runs at once are --jobs.
DEFAULTS = ("--monitor", "false", "--trainer.devices", "1")


def rehearse(*runs: Sequence[str]) -> tuple[Path, list[dict[str, Any]]]:
    """Build all that `fit` with each of these arguments needs, and run nothing.

    Returns:
        The folder under which all runs are to lie, and the settings of each run, by name.

    Raises:
        UserError: whatever is wrong with them, or with the data.
    """
    settings, roots = [], []
    data: dict[str, FashionMNIST] = {}  # one of each source is enough
    for arguments in runs:
        built = run.command_line(["fit", *arguments], run.Rehearsal)
        given = built.config["fit"]
        for name in ("ckpt_path", "resume"):
            if given[name] is not None:
                raise UserError(f"Each run of a study begins anew: leave out --{name}.")
        if given.trainer.fast_dev_run or given.trainer.enable_checkpointing is False:
            raise UserError(
                "What a run of a study has done is read from its folder: leave out --trainer.fast_dev_run and "
                "--trainer.enable_checkpointing."
            )
        if built.trainer.world_size > 1:
            raise UserError("Each run of a study has one process: --trainer.devices 1. Several runs at once: --jobs 2")
        data.setdefault(built.datamodule.source, built.datamodule)
        all_of_it = folder.flat(yaml.safe_load(built._parser("fit").dump(given, skip_unset=False)))
        settings.append({name: value for name, value in all_of_it.items() if name not in folder.NOT_RECORDED})
        roots.append(Path(given.trainer.default_root_dir))
    for module in data.values():
        module.prepare_data()
    if len(set(roots)) > 1:
        raise UserError("All runs of a study lie in one place: leave out --trainer.default_root_dir of some.")
    return roots[0], settings


@contextmanager
def alone_in(path: Path) -> Iterator[None]:
    """Hold the folder of a study against other processes.

    Raises:
        UserError: another one has it, or it cannot be made.
    """
    lock = filelock.FileLock(path / ".lock", timeout=0)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise UserError(f"The study in {str(path)!r} is under way in another process.") from None
    except OSError as error:
        raise UserError(
            f"No folder for the study can be made in {str(path)!r}: {error.strerror}. Another place: "
            "--trainer.default_root_dir FOLDER"
        ) from error
    try:
        yield
    finally:
        lock.release()


def refuse_changes(place: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Hold the settings of a study that goes on to those with which it began.

    A setting that there was not yet had its default.

    Raises:
        UserError: they are others; the message names them.
    """
    if now.keys() - before.keys():
        before = {**rehearse(("--data.source", "sample"))[1][0], **before}
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        lines = [f"    --{name} was {before.get(name)} and is now {now.get(name)}" for name in changed[:10]]
        raise UserError(
            "\n".join([f"The study {place} was begun with other settings:", *lines])
            + "\nGo on with the same command, or begin another study: --name NAME"
        )


def finished_run(parent: Path) -> Path | None:
    """The last of the runs `parent/N` that came to its end."""
    done = [path for path in _runs(parent) if records.read_result(path).get("finished")]
    return done[-1] if done else None


def failed_run(parent: Path) -> tuple[Path, str] | None:
    """The last of the runs `parent/N` whose loss was no number, with which no run can go on; and what to say of it."""
    failed = [path for path in _runs(parent) if (path / "failure.json").is_file()]
    if not failed:
        return None
    failure = json.loads((failed[-1] / "failure.json").read_text(encoding="utf-8"))
    return failed[-1], f"the loss is no number in step {failure['step']:,}, epoch {failure['epoch'] + 1}"


def _runs(parent: Path) -> list[Path]:
    return sorted((path for path in parent.glob("*") if path.name.isdecimal()), key=lambda path: int(path.name))


class Board:
    """Shows how far all runs are: at a terminal as a bar, elsewhere as a line for each run that has ended.

    Args:
        total: how many runs there are to be.
        done: how many of them there were before.
    """

    def __init__(self, total: int, done: int) -> None:
        self._total, self._before = total, done
        self._fractions: dict[Any, float] = {}
        self._lock = threading.Lock()  # runs are reported by several threads
        self._began = time.monotonic()
        self._bar = tqdm(
            total=total,
            initial=done,
            file=sys.stdout,
            disable=not sys.stdout.isatty(),
            bar_format="{bar}| {n:.1f}/{total} runs [{elapsed}<{remaining}]",
        )

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        self._bar.close()

    def advance(self, key: Any, fraction: float) -> None:
        """Note how far the run `key` is."""
        with self._lock:
            self._fractions[key] = max(fraction, self._fractions.get(key, 0.0))
            self._bar.n = self._before + sum(self._fractions.values())
            self._bar.refresh()

    def end(self, key: Any, line: str) -> None:
        """Note that the run `key` has ended, and say so."""
        self.advance(key, 1.0)
        with self._lock:
            done = sum(self._fractions.values())
            left = self._total - self._before - done
            ended = self._before + sum(fraction == 1 for fraction in self._fractions.values())
            line = f"[{ended}/{self._total}] {line}"
            if self._bar.disable and left > 0:
                seconds = (time.monotonic() - self._began) / done * left
                line += f"; about {seconds:.0f} s to go" if seconds < 100 else f"; about {seconds / 60:.0f} min to go"
            self._bar.write(line, file=sys.stdout)
            sys.stdout.flush()


@contextmanager
def running(jobs: int, total: int, done: int) -> Iterator[tuple[workers.Workers, Board]]:
    """Workers for the runs that are left, and a board for all. Within, SIGTERM is as Ctrl-C.

    Raises:
        KeyboardInterrupt: the runs were stopped, which is said.
    """

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with workers.Workers(jobs, max(1, total - done)) as pool, Board(total, done) as board:
            try:
                yield pool, board
            except (KeyboardInterrupt, workers.Interrupted):
                print("\nstopped; what is done is kept, and the same command goes on", flush=True)
                raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGTERM, before)


def short(names: Iterable[str]) -> dict[str, str]:
    """Of each setting its last word, or all of it where two end alike."""
    ends = {name: name.rpartition(".")[2] for name in names}
    return {name: end if list(ends.values()).count(end) == 1 else name for name, end in ends.items()}
