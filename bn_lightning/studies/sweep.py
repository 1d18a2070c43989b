"""`sweep`: search the settings with the best validation metric, with Optuna.

Each trial is a `fit` in a folder of its own, `runs/NAME/trial-N/M`.
"""

import argparse
import contextlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.trial import TrialState

from bn_lightning import terminal
from bn_lightning.errors import RunFailed, UserError
from bn_lightning.runs import experiment, process
from bn_lightning.studies import space as spaces
from bn_lightning.studies import study, sweep_report
from bn_lightning.studies.objective import Objective
from bn_lightning.studies.search import PRUNERS, SAMPLERS, STORAGE_ERRORS, Search
from bn_lightning.studies.space import Space
from bn_lightning.studies.statistics import Selection

# The test set must not influence the search.
DEFAULTS = (*study.DEFAULTS, "--trainer.limit_test_batches", "0")

DESCRIPTION = """\
Search the settings with the best validation metric, with Optuna.

Each trial is a `fit` in a folder of its own, `runs/NAME/trial-N/M`. The test set is never used.
Trials are stored in a database, by default a file in the folder of the study. With a PostgreSQL
server any number of machines share one study.
"""

EPILOG = """\
A config has, beside the settings of fit:

    sweep:
        trials: 30
        space:
            model.lr: {low: 0.01, high: 1.0, log: true}
            data.batch_size: [64, 128, 256]

The same command resumes a study; --trials may be increased.
"""


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, Space, list[str]]:
    """Return the options of `sweep`, the search space, and the settings that all runs share.

    Raises:
        UserError: a mistake in the options or in a config.
    """
    parser = _parser()
    try:
        options, common = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}\nAll options: {parser.prog} --help") from error
    section: dict[str, Any] = {}
    configs = []
    for file in options.config:
        content, own_section = _read_config(file)
        section |= own_section
        configs += ["--config", json.dumps(content)]
    _complete(options, section)
    space = section.get("space")
    if not isinstance(space, dict) or not space:
        raise UserError(
            "There is no space to search in: a --config needs a section `sweep` with a `space`.\n"
            f"For an example: {parser.prog} --help"
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
        help="YAML file; one of them must contain a `sweep` section.",
    )
    parser.add_argument(
        "--trials",
        type=int,
        metavar="N",
        help="Number of trials in all, on all machines (default: 30).",
    )
    parser.add_argument(
        "--sampler", choices=SAMPLERS, help="How to choose the next settings (default: tpe)."
    )
    parser.add_argument(
        "--pruner", choices=PRUNERS, help="How to choose trials to end early (default: asha)."
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help=study.HELP_JOBS)
    parser.add_argument("--name", default="sweep", help=f"{study.HELP_NAME} (default: sweep).")
    parser.add_argument(
        "--storage",
        metavar="URL",
        help="postgresql://USER:PASSWORD@HOST/DATABASE (default: a file in the study's folder).",
    )
    return parser


def _read_config(file: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of `fit` in a config, and its section `sweep`."""
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
        return content, {**content.pop("sweep", {})}
    except (OSError, yaml.YAMLError, AttributeError, TypeError) as error:
        raise UserError(f"{file!r} is not a config: {error}") from error


def _complete(options: argparse.Namespace, section: dict[str, Any]) -> None:
    """Take options that were not typed from the section of a config, and check all of them."""
    allowed = ("trials", "sampler", "pruner", "space")
    if unknown := section.keys() - set(allowed):
        raise UserError(
            f"The section sweep has {', '.join(sorted(unknown))}; it may have {', '.join(allowed)}."
        )
    for name, default in (("trials", 30), ("sampler", "tpe"), ("pruner", "asha")):
        if getattr(options, name) is None:
            setattr(options, name, section.get(name, default))
    for name, known in (("sampler", SAMPLERS), ("pruner", PRUNERS)):
        value = getattr(options, name)
        if value not in known:
            raise UserError(f"The {name} is {value!r}; it must be one of {', '.join(known)}.")
    for name in ("trials", "jobs"):
        value = getattr(options, name)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{name} is {value}; it must be a whole number, at least 1.")


def main(arguments: list[str], reference: str) -> None:
    """Run the search; `arguments` begins with the command."""
    options, space, common = parse(arguments[1:])
    process.set_up()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found = experiment.load(reference)
    selection = Selection(*found.task.selects)
    plan = _plan(reference, space, common, selection)
    # Settings of the machine and the source of the data may differ between the machines of a study.
    local = {f"data.{name}" for name in (*found.data.machine_settings, *found.data.source_settings)}
    settings = {name: value for name, value in plan.settings[0].items() if name not in local}
    fixed = {
        **settings,
        "sweep.space": {name: repr(distribution) for name, distribution in space.items()},
        study.SELECTS: [selection.metric, selection.mode],
    }
    defaults = plan.defaults | {study.SELECTS: fixed[study.SELECTS]}
    place = plan.root / options.name
    with contextlib.nullcontext() if options.storage else study.alone_in(place):
        place.mkdir(parents=True, exist_ok=True)
        search = Search(place, options, selection.direction, fixed, defaults)
        is_open = search.trials_of(TrialState.WAITING, TrialState.RUNNING)
        if len(search.done()) < options.trials or is_open:
            _run_trials(search, options, space, common, selection, reference)
        sweep_report.write(search, options.name, selection, _changed(settings, plan.defaults))


def _plan(reference: str, space: Space, common: Sequence[str], selection: Selection) -> study.Plan:
    """Rehearse the common settings, and each end of the space.

    Raises:
        UserError: a mistake in the settings, or no held-out samples to select by.
    """
    ends = [[*common, *spaces.flags(params)] for params in spaces.extremes(space)]
    plan = study.rehearse(reference, common, *ends)
    if not plan.holds_out:
        raise UserError(
            f"No validation samples are held out: a sweep selects by {selection.metric}, which "
            "must not be measured on the test set.\n"
            "Hold out samples with a --data setting (see fit --help), and remove "
            "--trainer.limit_val_batches 0."
        )
    return plan


def _changed(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that differ from those of `fit`, without the `DEFAULTS` of a sweep."""
    own = dict(zip(DEFAULTS[::2], DEFAULTS[1::2], strict=True))
    return {
        name: value
        for name, value in settings.items()
        if value != defaults.get(name) and str(value).lower() != own.get(f"--{name}")
    }


def _run_trials(
    search: Search,
    options: argparse.Namespace,
    space: Space,
    common: Sequence[str],
    selection: Selection,
    reference: str,
) -> None:
    """Run trials in parallel until there are as many as wanted."""
    done = len(search.done())
    total = max(options.trials, done)
    with study.running(reference, options.jobs, total, done) as (pool, progress):
        objective = Objective(search, space, common, selection, pool, progress)
        try:
            threads = [
                pool.threads.submit(search.work, objective, pool.stopped) for _ in range(pool.count)
            ]
            for future in as_completed(threads):
                future.result()
        except STORAGE_ERRORS as error:
            raise RunFailed(
                f"The storage of the study is gone: {str(error).splitlines()[0]}\n"
                "When it is back, the same command resumes the study."
            ) from error
