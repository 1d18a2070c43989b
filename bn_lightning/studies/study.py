"""A study: the settings of its runs, the lock of its folder, and the runs to resume."""

import itertools
import json
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import lightning.pytorch as pl

from bn_lightning.errors import UserError
from bn_lightning.runs import folder, result, run
from bn_lightning.studies import code, devices, workers
from bn_lightning.studies.progress import StudyProgress
from bn_lightning.training.data_module import DataModule
from bn_lightning.training.losses import FAILURE

# Default flags of each run; flags on the command line override them. Monitors are
# useful only for single runs. With several runs, --jobs uses the hardware better than
# --trainer.devices.
DEFAULTS = ("--monitor", "false", "--trainer.devices", "1")

# A study stores under this key the metric that selects checkpoints, and its direction.
SELECTS = "task.selects"

HELP_JOBS = (
    "Number of runs to train in parallel. CPU cores are divided among them, and each uses its own "
    "GPU if there are enough (default: 1)."
)
HELP_NAME = "Name of the study; its runs are stored in runs/NAME"
RERUN = "--rerun stale trains stale runs again.\n"
HELP_RERUN = (
    "Train stale runs again. A run is stale if its source or its version of PyTorch differs from "
    "the current one."
)


@dataclass(frozen=True)
class Plan:
    """The settings of the runs of a study.

    Attributes:
        root: the folder of all studies and runs.
        settings: the settings of each run, by names such as `trainer.max_epochs`.
        defaults: the default settings of `fit`.
        holds_out: whether every run validates on held-out samples.
        names_device: whether --trainer.devices names devices by their numbers.
    """

    root: Path
    settings: list[dict[str, Any]]
    defaults: dict[str, Any]
    holds_out: bool
    names_device: bool

    def gpus(self) -> list[str]:
        """Return the GPUs to assign to parallel runs."""
        return [] if self.names_device else devices.visible()


def plan_runs(
    reference: str,
    *runs: Sequence[str],
    names: Sequence[str] = (),
    check: Callable[[pl.Trainer, DataModule], None] = lambda trainer, data: None,
) -> Plan:
    """Validate the settings of each run, and prepare the data.

    Everything that `fit` would construct is constructed, but nothing is trained.

    Args:
        reference: import path of the experiment.
        runs: the arguments of `fit` for each run.
        names: what distinguishes each run from the others, for messages.
        check: raises a UserError if a run is not suitable; its data are prepared.

    Raises:
        UserError: the settings or the data are invalid.
    """
    settings: list[dict[str, Any]] = []
    defaults: dict[str, Any] = {}
    roots, trainers, modules, holds_out = set(), [], [], True
    for arguments, name in itertools.zip_longest(runs, names):
        # The networks of many runs would take a lot of memory, so they are not kept.
        with naming(name if len(runs) > 1 else None):
            cli = rehearse(reference, arguments)
        settings.append(_result_settings(cli, cli.config.fit))
        roots.add(Path(cli.config.fit.trainer.default_root_dir))
        trainers.append(cli.trainer)
        modules.append(cli.datamodule)
        holds_out &= _holds_out(cli)
        defaults = defaults or _result_settings(cli, cli.defaults())
    if len(roots) > 1:
        raise UserError(
            "All runs of a study are stored in the same folder, but --trainer.default_root_dir "
            "differs between them.\nSet it once, for all runs."
        )
    _prepare_data(modules)
    for trainer, module in zip(trainers, modules, strict=True):
        check(trainer, module)
    counts = [str(one["trainer.devices"]) for one in settings]
    names_device = not all(count.isdecimal() or count == "auto" for count in counts)
    return Plan(roots.pop(), settings, defaults, holds_out, names_device)


def rehearse(reference: str, arguments: Sequence[str]) -> run.CLI:
    """Construct everything that `fit` would construct, and return it.

    Raises:
        UserError: the settings are invalid, or a study does not support them.
    """
    cli = run.command_line(["fit", *arguments], reference, run.Rehearsal)
    _refuse_unsupported_settings(cli)
    return cli


@contextmanager
def naming(combination: str | None) -> Iterator[None]:
    """Put the name of a combination of settings before the message of a UserError.

    Of the settings of a study, often only one combination is invalid.
    """
    try:
        yield
    except UserError as error:
        if combination is None:
            raise
        raise type(error)(f"{combination} cannot be trained:\n{error}") from error


def read_settings(reference: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the settings of `fit` with the given arguments, which may be incomplete."""
    cli = run.command_line(["fit", *arguments], reference, _Reading)
    return _result_settings(cli, cli.config.fit)


class _Reading(run.Rehearsal):
    """A command line that reads settings and constructs nothing."""

    def instantiate_classes(self) -> None:
        pass


def _prepare_data(modules: Sequence[DataModule]) -> None:
    """Prepare the data of all runs. Data that several runs share are read only once."""
    for number, module in enumerate(modules):
        for earlier in modules[:number]:
            module.reuse(earlier)
        module.prepare_data()


def _refuse_unsupported_settings(cli: run.CLI) -> None:
    """Raise a UserError for settings of `fit` that a study does not support."""
    settings = cli.config.fit
    for name in ("ckpt_path", "resume"):
        if settings[name] is not None:
            raise UserError(
                f"--{name} cannot be used in a study: each run starts from new weights.\n"
                "Remove the flag."
            )
    if settings.trainer.fast_dev_run or settings.trainer.enable_checkpointing is False:
        raise UserError(
            "--trainer.fast_dev_run and --trainer.enable_checkpointing false cannot be used in a "
            "study: with either flag, a run writes no results.\n"
            "Remove these flags."
        )
    if cli.trainer.world_size > 1:
        raise UserError(
            "Each run of a study uses one process, but the settings request "
            f"{cli.trainer.world_size}.\n"
            "Use --trainer.devices 1. To train several runs in parallel, add --jobs 2."
        )


def _result_settings(cli: run.CLI, settings: Any) -> dict[str, Any]:
    """Return the settings that affect the result of a run, by name."""
    found = folder.flat(cli.as_plain_data(settings))
    return {name: value for name, value in found.items() if name not in folder.NOT_RECORDED}


def _holds_out(cli: run.CLI) -> bool:
    """Return whether a run validates on held-out samples."""
    return not cli.datamodule.validates_on_test_set and cli.trainer.limit_val_batches != 0


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Create the folder of a study, and lock it against other processes.

    Raises:
        UserError: another process has locked the folder, or it cannot be created.
    """
    lock = filelock.FileLock(path / ".lock", timeout=0)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise UserError(
            f"The study in {str(path)!r} is running in another process.\n"
            "Wait until that process ends, or start another study: --name NAME"
        ) from None
    except OSError as error:
        raise UserError(
            f"The folder {str(path)!r} cannot be created: {error.strerror}.\n"
            "Choose another folder for all runs with --trainer.default_root_dir FOLDER"
        ) from error
    try:
        yield
    finally:
        lock.release()


def refuse_changes(
    name: str, before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
    """Refuse to resume a study if its settings have changed since it was started.

    Settings that did not exist when the study was started count as their defaults.

    Raises:
        UserError: settings have changed. The message lists them.
    """
    before = {**{key: defaults[key] for key in now if key in defaults}, **before}
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if changed:
        lines = [
            f"    --{key} was {before.get(key)} and is now {now.get(key)}" for key in changed[:10]
        ]
        raise UserError(
            "\n".join([f"The study {name} was started with other settings:", *lines])
            + "\nUse the original settings to resume it, or start another study: --name NAME"
        )


def finished_run(parent: Path) -> Path | None:
    """Return the last folder `parent/N`, for a number N, of a finished run, or None."""
    finished = [path for path in _numbered_runs(parent) if result.read_result(path).get("finished")]
    return finished[-1] if finished else None


def failed_run(parent: Path) -> tuple[Path, str] | None:
    """Return the last folder `parent/N` of a run that failed, and a message, or None.

    A run has failed if a loss was not finite. It cannot be resumed with the same
    settings.
    """
    failed = [path for path in _numbered_runs(parent) if (path / FAILURE).is_file()]
    if not failed:
        return None
    failure = json.loads((failed[-1] / FAILURE).read_text(encoding="utf-8"))
    return failed[-1], (
        f"non-finite loss at step {failure['step']:,}, epoch {failure['epoch'] + 1}"
    )


def fit(
    pool: workers.Workers,
    arguments: Sequence[str],
    log: Path,
    on_progress: workers.OnProgress,
) -> Path:
    """Run `fit` in a worker; after a failure of the machine, run it once more.

    Raises:
        RunFailed: the run failed, or the machine failed again. A full disk is not tried
            again.
        Interrupted: the run was stopped by a signal.
    """
    try:
        return pool.fit(arguments, log, on_progress)
    except workers.MachineFailure as error:
        if error.is_disk_full:
            raise
    return pool.fit(arguments, log, on_progress)


def describe_full_disk(error: workers.MachineFailure) -> str:
    return (
        f"The study was stopped, because the disk is full: {str(error).splitlines()[0]}\n"
        "Free some space. Then the same command resumes the study."
    )


def set_aside_stale_runs(parent: Path, current: code.Code) -> None:
    """Move runs of other code from `parent/N` to `parent/stale/N`.

    There, a run is neither resumed nor reported.
    """
    for path in _numbered_runs(parent):
        if current.difference(code.recorded(path)):
            target = folder.new_folder(parent / "stale")
            # On Windows, a folder cannot replace another one.
            target.rmdir()
            path.rename(target)


def _numbered_runs(parent: Path) -> list[Path]:
    numbered = [path for path in parent.glob("*") if path.name.isdecimal()]
    return sorted(numbered, key=lambda path: int(path.name))


@contextmanager
def start_workers(
    reference: str, jobs: int, total: int, done: int, gpus: Sequence[str] = ()
) -> Iterator[tuple[workers.Workers, StudyProgress]]:
    """Start workers for the remaining runs.

    Within the context, SIGTERM raises KeyboardInterrupt, as Ctrl-C does.

    Args:
        reference: import path of the experiment.
        jobs: number of runs to train in parallel.
        total: number of runs in the study.
        done: number of runs that have already ended.
        gpus: GPUs that parallel runs share.

    Raises:
        KeyboardInterrupt: the study was stopped. A message about resuming it has been
            printed.
    """

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    remaining = max(1, total - done)
    # The next line appears at the end of the first run, which may take hours.
    parallel = f", {min(jobs, remaining)} in parallel" if jobs > 1 else ""
    on_gpus = f" on the GPUs {', '.join(gpus)}" if jobs > 1 and gpus else ""
    print(
        f"[{done} of {total} runs are done; training {remaining}{parallel}{on_gpus}. "
        "The output of each run is in its log.txt]",
        flush=True,
    )
    try:
        with (
            workers.Workers(reference, jobs, remaining, gpus) as pool,
            StudyProgress(total, done) as progress,
        ):
            try:
                yield pool, progress
            except (KeyboardInterrupt, workers.Interrupted):
                print(
                    "\nStopped. Finished runs are saved; the same command resumes the study.",
                    flush=True,
                )
                raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGTERM, before)


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Return a short name for each setting.

    The short name is the part after the last dot. If several settings share that part,
    the whole name is used.
    """
    ends = {name: name.rpartition(".")[2] for name in names}
    return {
        name: end if list(ends.values()).count(end) == 1 else name for name, end in ends.items()
    }
