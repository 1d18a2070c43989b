"""`sweep`: search for the settings with the best validation metric, with Optuna.

Each trial is a `fit` in its own folder, `runs/NAME/trial-N/M`.
"""

import argparse
import contextlib
import functools
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.trial import TrialState

from bn_lightning import terminal
from bn_lightning.errors import RunFailed, UserError
from bn_lightning.runs import experiment, process
from bn_lightning.studies import code, repetitions, shared_settings, study, sweep_report
from bn_lightning.studies import space as spaces
from bn_lightning.studies.first_validation import refuse_runs_without_validation
from bn_lightning.studies.objective import Objective, describe
from bn_lightning.studies.search import PRUNERS, SAMPLERS, STORAGE_ERRORS, Search
from bn_lightning.studies.space import Space
from bn_lightning.studies.statistics import Selection

# The test set must not influence the search.
DEFAULTS = (*study.DEFAULTS, "--trainer.limit_test_batches", "0")

PASSWORD_IS_VISIBLE = (
    "WARNING: The password in --storage is visible in the list of processes. Leave it out of the "
    "URL, and store it in the file that PGPASSFILE names (~/.pgpass)."
)

DESCRIPTION = """\
Search for the settings with the best validation metric, with Optuna.

Each trial is a `fit` in its own folder, `runs/NAME/trial-N/M`. The test set is never used.
Trials are stored in a database, by default in a file in the folder of the study. With a
PostgreSQL server, several machines can work on the same study.
"""

EPILOG = """\
A config with a `sweep` section (all other settings are those of fit):

    sweep:
        trials: 30
        space:
            model.lr: {low: 0.01, high: 1.0, log: true}
            data.batch_size: [64, 128, 256]

The same command resumes a study. To add trials, increase --trials.
"""


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, Space, list[str]]:
    """Return the options of `sweep`, the search space, and the settings that all runs share.

    Raises:
        UserError: the options or a config are invalid.
    """
    parser = _parser()
    try:
        options, common = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}\nFor all options, see: {parser.prog} --help") from error
    section: dict[str, Any] = {}
    configs = []
    for file in options.config:
        content, own_section = _read_config(file)
        section |= own_section
        configs += ["--config", json.dumps(content)]
    _merge(options, section)
    _check(options)
    space = section.get("space")
    if not isinstance(space, dict) or not space:
        raise UserError(
            "No search space is given: add a `sweep` section with a `space` to a --config file.\n"
            f"For an example, see: {parser.prog} --help"
        )
    return options, spaces.read(space), [*DEFAULTS, *configs, *common]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        f"{terminal.program()} sweep",
        usage="%(prog)s --config FILE [options] [settings of fit]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="YAML file. The option can be repeated; one file must contain a `sweep` section.",
    )
    parser.add_argument(
        "--trials",
        type=int,
        metavar="N",
        help="Total number of trials over all machines (default: 30).",
    )
    parser.add_argument(
        "--sampler",
        choices=SAMPLERS,
        help="Method that chooses the settings of each trial (default: tpe).",
    )
    parser.add_argument(
        "--pruner", choices=PRUNERS, help="Method that ends poor trials early (default: asha)."
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help=study.HELP_JOBS)
    parser.add_argument("--name", default="sweep", help=f"{study.HELP_NAME} (default: sweep).")
    parser.add_argument("--rerun", choices=["stale"], help=study.HELP_RERUN)
    parser.add_argument(
        "--storage",
        metavar="URL",
        help="URL of a database server: postgresql://USER@HOST/DATABASE (default: a file in "
        "runs/NAME). Store the password in the file that PGPASSFILE names (~/.pgpass); in the "
        "URL, other users of this machine could see it in the list of processes.",
    )
    return parser


def _read_config(file: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of `fit` in a config, and its `sweep` section."""
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
        return content, {**content.pop("sweep", {})}
    except OSError as error:
        raise UserError(f"The config {file!r} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, AttributeError, TypeError) as error:
        raise UserError(
            f"{file!r} is not a valid config: {error}\n"
            "A config is a YAML mapping from settings to values. For an example, see: "
            f"{terminal.program()} sweep --help"
        ) from error


def _merge(options: argparse.Namespace, section: dict[str, Any]) -> None:
    """Set options that are not on the command line to those of the `sweep` section."""
    allowed = ("trials", "sampler", "pruner", "space")
    if unknown := section.keys() - set(allowed):
        raise UserError(
            f"Unknown settings in the `sweep` section: {', '.join(sorted(unknown))}.\n"
            f"Allowed settings: {', '.join(allowed)}."
        )
    for name, default in (("trials", 30), ("sampler", "tpe"), ("pruner", "asha")):
        if getattr(options, name) is None:
            setattr(options, name, section.get(name, default))


def _check(options: argparse.Namespace) -> None:
    for name, known in (("sampler", SAMPLERS), ("pruner", PRUNERS)):
        value = getattr(options, name)
        if value not in known:
            raise UserError(f"Unknown {name} {value!r}: use {' or '.join(known)}.")
    for name in ("trials", "jobs"):
        value = getattr(options, name)
        if not isinstance(value, int) or value < 1:
            raise UserError(
                f"{name} is {value!r}; it must be an integer of at least 1, for example --{name} 2."
            )


def main(arguments: list[str], reference: str) -> None:
    """Run `sweep`. The first of the arguments is the command.

    Raises:
        UserError: the options or settings are invalid.
        RunFailed: the storage of the study became unavailable.
    """
    options, space, common = parse(arguments[1:])
    if re.match(r"[^/]+://[^@/]*:[^@/]+@", options.storage or ""):
        print(PASSWORD_IS_VISIBLE, file=sys.stderr, flush=True)
    process.set_up()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    loaded = experiment.load(reference)
    selection = Selection(*loaded.task.selects)
    _refuse_repetitions(space, repetitions.declared_by(loaded.data))
    plan = _plan(reference, space, common, selection)
    # These settings may differ between the machines that work on a study.
    names = (*loaded.data.machine_settings, *loaded.data.source_settings)
    local = {f"data.{name}" for name in names}
    all_settings = study.read_settings(reference, common)
    settings = {name: value for name, value in all_settings.items() if name not in local}
    fixed = {
        **settings,
        "sweep.space": {name: repr(distribution) for name, distribution in space.items()},
        study.SELECTS: [selection.metric, selection.mode],
    }
    defaults = plan.defaults | {study.SELECTS: fixed[study.SELECTS]}
    read = functools.cache(Path.read_bytes)

    def code_of(params: Mapping[str, Any]) -> code.Code:
        return code.identify(reference, {**all_settings, **params}, read)

    folder = plan.root / options.name
    with contextlib.nullcontext() if options.storage else study.locked(folder):
        folder.mkdir(parents=True, exist_ok=True)
        search = Search(folder, options, selection.direction, fixed, defaults)
        stale = search.stale_trials(code_of)
        if options.rerun == "stale":
            search.repeat_stale_trials(stale)
        elif stale:
            print(sweep_report.describe_stale(stale), end="", flush=True)
        unfinished = search.get_trials(TrialState.WAITING, TrialState.RUNNING)
        if unfinished or len(search.done()) < options.trials:
            _run_trials(search, options, space, common, selection, reference, code_of, plan.gpus())
        changed = shared_settings.non_defaults([settings], plan.defaults, DEFAULTS)
        try:
            sweep_report.write(
                search, options.name, selection, changed, search.stale_trials(code_of)
            )
        except OSError as error:
            raise RunFailed(
                f"The report of the sweep cannot be written to {folder}: {error}\n"
                "Fix the cause, then run the same command again. It does not repeat the trials."
            ) from error


def _refuse_repetitions(space: Space, repeated: Sequence[str]) -> None:
    """Raise a UserError if repetitions, such as folds, are searched."""
    for name in repeated:
        if name in space:
            raise UserError(
                f"{name} cannot be searched: its values are repetitions, and the sweep would "
                "select the one with the easiest validation samples.\n"
                f"Remove it from the search space, and set it for all trials: --{name} VALUE"
            )


def _plan(reference: str, space: Space, common: Sequence[str], selection: Selection) -> study.Plan:
    """Validate the common settings together with those in the search space.

    Raises:
        UserError: the settings are invalid, or no validation samples are held out.
    """

    def arguments(params: Mapping[str, Any]) -> list[str]:
        return [*common, *spaces.flags(params)]

    def validate(params: Mapping[str, Any]) -> None:
        with study.naming(f"A trial with {describe(params)}"):
            study.rehearse(reference, arguments(params))

    points = spaces.valid_points(space, validate)
    plan = study.plan_runs(reference, *map(arguments, points), check=refuse_runs_without_validation)
    if not plan.holds_out:
        raise UserError(
            f"No validation samples are held out. A sweep selects by {selection.metric}, which "
            "must not be measured on the test set.\n"
            "Hold out samples with a --data setting (see fit --help), and remove "
            "--trainer.limit_val_batches 0."
        )
    return plan


def _run_trials(
    search: Search,
    options: argparse.Namespace,
    space: Space,
    common: Sequence[str],
    selection: Selection,
    reference: str,
    code_of: Callable[[Mapping[str, Any]], code.Code],
    gpus: Sequence[str],
) -> None:
    """Run trials in parallel until the requested number is done."""
    done = len(search.done())
    total = max(options.trials, done)
    with study.start_workers(reference, options.jobs, total, done, gpus) as (pool, progress):
        objective = Objective(search, space, common, selection, pool, progress, code_of)
        try:
            threads = [
                pool.threads.submit(search.run_trials, objective, pool.stopped)
                for _ in range(pool.count)
            ]
            for future in as_completed(threads):
                future.result()
        except STORAGE_ERRORS as error:
            raise RunFailed(
                f"The storage of the study became unavailable: {str(error).splitlines()[0]}\n"
                "When it is available again, the same command resumes the study."
            ) from error
