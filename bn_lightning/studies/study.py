"""A study: the settings that its runs share, the folder of each run, and what may be resumed."""

import json
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from bn_lightning.errors import UserError
from bn_lightning.runs import folder, result, run
from bn_lightning.studies import workers
from bn_lightning.studies.progress import StudyProgress
from bn_lightning.training.data_module import DataModule
from bn_lightning.training.losses import FAILURE

# Weaker than what is typed: monitors are for looking at single runs, and --jobs is for several runs
# at once.
DEFAULTS = ("--monitor", "false", "--trainer.devices", "1")

# Among the settings of a study: the selected metric and its direction.
SELECTS = "task.selects"

HELP_JOBS = "Number of runs to train in parallel; CPU cores are divided among them (default: 1)."
HELP_NAME = "Name of the study; its runs are stored in runs/NAME"


@dataclass(frozen=True)
class Plan:
    """The runs of a study, as they will be trained.

    Attributes:
        root: the folder in which all studies and runs are stored.
        settings: the settings of each run by their names, such as `trainer.max_epochs`.
        defaults: the settings of `fit` where nothing is set.
        holds_out: whether every run is validated, and on held-out samples.
    """

    root: Path
    settings: list[dict[str, Any]]
    defaults: dict[str, Any]
    holds_out: bool


def rehearse(reference: str, *runs: Sequence[str]) -> Plan:
    """Validate the settings of each run by constructing what `fit` would construct, and the data.

    Args:
        reference: of the experiment.
        runs: for each run, the arguments of `fit`.

    Raises:
        UserError: whatever is wrong with the settings or the data.
    """
    settings: list[dict[str, Any]] = []
    defaults: dict[str, Any] = {}
    roots, modules, holds_out = set(), [], True
    for arguments in runs:
        # Only its data module is kept: networks may be large, and runs many.
        cli = run.command_line(["fit", *arguments], reference, run.Rehearsal)
        _refuse_settings(cli)
        settings.append(_named(cli, cli.config.fit))
        roots.add(Path(cli.config.fit.trainer.default_root_dir))
        modules.append(cli.datamodule)
        holds_out &= _holds_out(cli)
        defaults = defaults or _named(cli, cli.defaults())
    if len(roots) > 1:
        raise UserError(
            "All runs of a study are stored in one place: give all of them the same "
            "--trainer.default_root_dir."
        )
    _prepare(modules)
    return Plan(roots.pop(), settings, defaults, holds_out)


def _prepare(modules: Sequence[DataModule]) -> None:
    """Prepare the data of all runs; modules that read the same data read them once."""
    for number, module in enumerate(modules):
        for earlier in modules[:number]:
            module.reuse(earlier)
        module.prepare_data()


def _refuse_settings(cli: run.CLI) -> None:
    settings = cli.config.fit
    for name in ("ckpt_path", "resume"):
        if settings[name] is not None:
            raise UserError(
                f"--{name} cannot be used in a study: each of its runs starts from new weights.\n"
                "Remove the flag."
            )
    if settings.trainer.fast_dev_run or settings.trainer.enable_checkpointing is False:
        raise UserError(
            "--trainer.fast_dev_run and --trainer.enable_checkpointing false cannot be used in a "
            "study: results are read from each run's folder.\nRemove the flag."
        )
    if cli.trainer.world_size > 1:
        raise UserError(
            "Each run of a study has one process: --trainer.devices 1. To train several runs in "
            "parallel: --jobs 2"
        )


def _named(cli: run.CLI, settings: Any) -> dict[str, Any]:
    """Return settings by their names, without those that do not change what is computed."""
    found = folder.flat(cli.as_plain_data(settings))
    return {name: value for name, value in found.items() if name not in folder.NOT_RECORDED}


def _holds_out(cli: run.CLI) -> bool:
    return not cli.datamodule.validates_on_test_set and cli.trainer.limit_val_batches != 0


@contextmanager
def alone_in(path: Path) -> Iterator[None]:
    """Lock the folder of a study against other processes.

    Raises:
        UserError: another process has locked it, or it cannot be made.
    """
    lock = filelock.FileLock(path / ".lock", timeout=0)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise UserError(f"The study in {str(path)!r} is under way in another process.") from None
    except OSError as error:
        raise UserError(
            f"No folder for the study can be made in {str(path)!r}: {error.strerror}.\n"
            "Another place: --trainer.default_root_dir FOLDER"
        ) from error
    try:
        yield
    finally:
        lock.release()


def refuse_changes(
    study: str, before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
    """Refuse to resume a study with settings other than those that it began with.

    A setting that did not exist when the study began had its default.

    Raises:
        UserError: settings have changed; the message names them.
    """
    before = {**{name: defaults[name] for name in now if name in defaults}, **before}
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        lines = [
            f"    --{name} was {before.get(name)} and is now {now.get(name)}"
            for name in changed[:10]
        ]
        raise UserError(
            "\n".join([f"The study {study} began with other settings:", *lines])
            + "\nResume it with the same command, or begin another study: --name NAME"
        )


def finished_run(parent: Path) -> Path | None:
    """Return the last of the runs `parent/N` that is finished."""
    finished = [path for path in _runs(parent) if result.read_result(path).get("finished")]
    return finished[-1] if finished else None


def failed_run(parent: Path) -> tuple[Path, str] | None:
    """Return the last of the runs `parent/N` that a non-finite loss has ended, and a message.

    Such a run cannot be resumed with the same settings.
    """
    failed = [path for path in _runs(parent) if (path / FAILURE).is_file()]
    if not failed:
        return None
    failure = json.loads((failed[-1] / FAILURE).read_text(encoding="utf-8"))
    return failed[-1], (
        f"non-finite loss in step {failure['step']:,}, epoch {failure['epoch'] + 1}"
    )


def _runs(parent: Path) -> list[Path]:
    numbered = [path for path in parent.glob("*") if path.name.isdecimal()]
    return sorted(numbered, key=lambda path: int(path.name))


@contextmanager
def running(
    reference: str, jobs: int, total: int, done: int
) -> Iterator[tuple[workers.Workers, StudyProgress]]:
    """Start workers for the runs that are left. Within the context, SIGTERM acts as Ctrl-C.

    Args:
        reference: of the experiment.
        jobs: number of runs at once.
        total: number of runs of the study.
        done: how many of them have ended before.

    Raises:
        KeyboardInterrupt: the study was stopped. A message says how to resume it.
    """

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    left = max(1, total - done)
    try:
        with (
            workers.Workers(reference, jobs, left) as pool,
            StudyProgress(total, done) as progress,
        ):
            try:
                yield pool, progress
            except (KeyboardInterrupt, workers.Interrupted):
                print(
                    "\nstopped; finished work is kept, and the same command resumes the study",
                    flush=True,
                )
                raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGTERM, before)


def short(names: Iterable[str]) -> dict[str, str]:
    """Return the last word of each setting, or all of it where two of them end alike."""
    ends = {name: name.rpartition(".")[2] for name in names}
    return {
        name: end if list(ends.values()).count(end) == 1 else name for name, end in ends.items()
    }
