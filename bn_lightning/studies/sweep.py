"""`sweep`: search settings for the best validation accuracy, with Optuna.

Each trial is a `fit` in a folder of its own, `runs/NAME/trial-N/M`. The test set is never looked at. What was tried is
kept in a database, by default a file of the study's folder; with a PostgreSQL server any number of machines work on one
study.
"""

import argparse
import collections
import contextlib
import json
import shlex
import socket
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import matplotlib
import optuna
import sqlalchemy
import yaml
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import FrozenTrial, Trial, TrialState

from bn_lightning import terminal
from bn_lightning.errors import RunFailed, UserError
from bn_lightning.runs import folder, records, run
from bn_lightning.studies import statistics, study, workers
from bn_lightning.training import checkpoints

SAMPLERS: dict[str, Callable[[], optuna.samplers.BaseSampler]] = {
    # The trials that others are at count as bad ones, so that no two try nearly the same.
    "tpe": lambda: optuna.samplers.TPESampler(constant_liar=True),
    "random": optuna.samplers.RandomSampler,
}
PRUNERS: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
    # Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning": the best third of each rung goes on.
    "asha": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3),
    "none": optuna.pruners.NopPruner,
}
# Seconds: how often a process says that its trials are under way, and after which silence others take them over.
HEARTBEAT, SILENCE = 2, 15
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
OF_STORAGE = (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError)
OF_A_MACHINE = ("data.root", "data.mirrors", "data.source")  # on another one they may be others
# Never on the test set, and what the norms do is for looking at single runs.
DEFAULTS = (*study.DEFAULTS, "--trainer.limit_test_batches", "0")

warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # taking over is, since 2021
retry = RetryHeartbeatStaleTrialCallback()
Space = dict[str, BaseDistribution]


def parse(arguments: list[str]) -> tuple[argparse.Namespace, Space, list[str]]:
    """What is typed and what configs say: options of `sweep`, the space, and settings of all runs."""
    parser = argparse.ArgumentParser(
        "python -m bn_lightning sweep",
        usage="%(prog)s --config FILE [options] [settings of fit]",
        description=(__doc__ or "").partition(": ")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="In a config, beside the settings of fit:\n\n"
        "    sweep:\n        trials: 30\n        space:\n"
        "            model.lr: {low: 0.01, high: 1.0, log: true}\n"
        "            model.activation: [relu, gelu]\n\n"
        "The same command goes on with a study that was begun; more trials may be asked for.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="With a section sweep in one.")
    parser.add_argument("--trials", type=int, metavar="N", help="How many trials in all, on all machines (30).")
    parser.add_argument("--sampler", choices=SAMPLERS, help="What to try next (tpe).")
    parser.add_argument("--pruner", choices=PRUNERS, help="Which trials to end early (asha).")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="Runs at once, the cores divided among them (1)."
    )
    parser.add_argument("--name", default="sweep", help="The runs lie in runs/NAME; another study, another name.")
    parser.add_argument(
        "--storage", metavar="URL", help="postgresql://USER:PASSWORD@HOST/DATABASE (a file of the study)."
    )
    try:
        options, common = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}\nAll options: {parser.prog} --help") from error
    section: dict[str, Any] = {}
    configs = []
    for file in options.config:
        try:
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
            section |= content.pop("sweep", {})
        except (OSError, yaml.YAMLError, AttributeError, TypeError) as error:
            raise UserError(f"{file!r} is no config: {error}") from error
        configs += ["--config", json.dumps(content)]
    allowed = ("trials", "sampler", "pruner", "space")
    if unknown := section.keys() - set(allowed):
        raise UserError(f"The section sweep has {', '.join(sorted(unknown))}; it may have {', '.join(allowed)}.")
    for name, default in (("trials", 30), ("sampler", "tpe"), ("pruner", "asha")):
        if getattr(options, name) is None:
            setattr(options, name, section.get(name, default))
    for name, known in (("sampler", SAMPLERS), ("pruner", PRUNERS)):
        if getattr(options, name) not in known:
            raise UserError(f"The {name} is {getattr(options, name)!r}; there are {', '.join(known)}.")
    for name in ("trials", "jobs"):
        if not isinstance(getattr(options, name), int) or getattr(options, name) < 1:
            raise UserError(f"{name} is {getattr(options, name)}; it must be a whole number, at least 1.")
    space = section.get("space")
    if not isinstance(space, dict) or not space:
        raise UserError(f"There is no space to search in: a config with a section sweep.\nAs in: {parser.prog} --help")
    distributions = {name: _distribution(name, values) for name, values in space.items()}
    return options, distributions, [*DEFAULTS, *configs, *common]


def _distribution(name: str, values: Any) -> BaseDistribution:
    """What a config says of a setting, as Optuna has it: a list of values, or a range."""
    try:
        if isinstance(values, list):
            return CategoricalDistribution(values)
        shape = dict(values)
        ends = shape.pop("low"), shape.pop("high")
        if all(isinstance(end, int) for end in ends):
            return IntDistribution(*ends, **shape)
        if all(isinstance(end, int | float) for end in ends):
            return FloatDistribution(*ends, **shape)
        error: Exception | None = None
    except (ValueError, TypeError, KeyError) as caught:
        error = caught
    raise UserError(
        f"The space of {name} is {values}{f': {error}' if error else ''}\n"
        "It must be a list of values, or {low: 0.01, high: 1.0}, with log: true or step: 0.1 if wanted; of whole "
        "numbers alone where both ends are whole.\n"
        "1e-3 is a text in YAML, and 1.0e-3 a number."
    ) from error


def _suggest(trial: Trial, name: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(
            name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
        )
    assert isinstance(distribution, FloatDistribution)
    return trial.suggest_float(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)


def _ends(distribution: BaseDistribution) -> list[Any]:
    """Values to try whether a setting can be set at all: each of a list, or both ends of a range."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    return [distribution.low, distribution.high]


def _flags(params: dict[str, Any]) -> list[str]:
    """As `fit` takes them."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in params.items()}
    return [text for name, value in texts.items() for text in (f"--{name}", value)]


class Search:
    """One study: what was tried, and how to try more.

    Args:
        place: its folder.
        options: of `sweep`.
        settings: of all runs, and the space; others than those with which it was begun are refused.
    """

    def __init__(self, place: Path, options: argparse.Namespace, settings: dict[str, Any]) -> None:
        self.place, self.trials = place, options.trials
        url = options.storage or f"sqlite:///{(place / 'study.db').as_posix()}"
        if url.startswith(("postgresql://", "postgres://")):  # the driver of the extra
            url = f"postgresql+psycopg://{url.partition('://')[2]}"
        try:
            try:
                storage = _open(url)
            except sqlalchemy.exc.DatabaseError:  # of two that make the tables at the same time one comes too late
                time.sleep(1)
                storage = _open(url)
            about = {"study_name": options.name, "storage": storage}
            about |= {"sampler": SAMPLERS[options.sampler](), "pruner": PRUNERS[options.pruner]()}
            try:
                self.study = optuna.create_study(**about, direction="maximize")
                is_new = True
            except optuna.exceptions.DuplicatedStudyError:
                self.study = optuna.load_study(**about)
                is_new = not self._is_described()
        except (*OF_STORAGE, ImportError, ValueError, RuntimeError) as error:
            raise UserError(
                f"The storage of the study cannot be used: {str(error).splitlines()[0]}\n"
                "It is a file by default; a server: --storage postgresql://USER:PASSWORD@HOST/DATABASE"
            ) from error
        now = json.loads(records.to_json(settings))
        if is_new:
            self.study.set_user_attr("id", uuid.uuid4().hex)
            self.study.set_user_attr("settings", now)
        else:
            study.refuse_changes(repr(options.name), self.study.user_attrs["settings"], now)
        self._refuse_runs_of_another()
        self._begins = threading.Lock()  # a trial that a thread begins must not be missing for another one
        self._mine = threading.local()
        self._requeue_lost()

    def _is_described(self) -> bool:
        """Whether who made the study has said what it is; waits for it, unless its process has gone."""
        for _ in range(5):
            if "settings" in self.study.user_attrs:
                return True
            time.sleep(1)
        return False

    def _refuse_runs_of_another(self) -> None:
        """Trials of two studies with the same numbers must not lie in one folder: one would go on with the other's."""
        mine, file = self.study.user_attrs["id"], self.place / "study-id"
        if not file.exists() and not any(self.place.glob("trial-*")):
            checkpoints.write_whole(file, mine.encode())
        if not file.exists() or file.read_text() != mine:
            raise UserError(
                f"In {str(self.place)!r} lie the runs of another study, from another storage.\n"
                "Give it that storage, or begin another study: --name NAME"
            )

    def _requeue_lost(self) -> None:
        """Queue what has failed with its process, where that was killed before it could be queued again."""
        trials = self.study.get_trials(deepcopy=False)
        retried = {number for trial in trials for number in retry.retry_history(trial)}
        for trial in trials:
            if trial.state == TrialState.FAIL and trial.number not in retried and "failure" not in trial.user_attrs:
                age = time.time() - trial.datetime_complete.timestamp() if trial.datetime_complete else 0
                if age > SILENCE:  # else it may be queued by another process at this moment
                    retry(self.study, trial)

    def trials_of(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)

    def done(self) -> list[FrozenTrial]:
        """Trials with an end, good or bad; not those whose process has gone, which are repeated."""
        failed = [trial for trial in self.trials_of(TrialState.FAIL) if "failure" in trial.user_attrs]
        return [*self.trials_of(*FINISHED), *failed]

    def work(self, objective: Callable[[Trial], float], stopped: threading.Event) -> None:
        """Run trials until there are as many as wanted and no one is at any. For several threads."""
        while not stopped.is_set():
            self._begins.acquire()
            self._mine.begins, self._mine.trial, self._mine.fault = True, None, None

            def begun(trial: Trial) -> float:
                self._mine.trial = trial.number
                self._has_begun()
                try:
                    return objective(trial)
                except Exception as error:
                    self._mine.fault = error
                    raise

            try:
                if self._is_one_missing():
                    self.study.optimize(begun, n_trials=1, catch=RunFailed)
                    continue
            except workers.Interrupted:
                retry(self.study, self.study.get_trials()[self._mine.trial])
                raise
            except (ValueError, UpdateFinishedTrialError):  # of a trial that has an end already
                if not self._is_taken_over():
                    raise
                print(f"trial {self._mine.trial} was silent, and another process has taken it over", flush=True)
                continue
            finally:
                self._has_begun()
            if not self.trials_of(TrialState.RUNNING):
                return
            stopped.wait(1)  # if its process goes, it is to be taken over

    def _has_begun(self) -> None:
        if self._mine.begins:
            self._mine.begins = False
            self._begins.release()

    def _is_one_missing(self) -> bool:
        fail_stale_trials(self.study)
        under_way = len(self.trials_of(TrialState.RUNNING))
        return bool(self.trials_of(TrialState.WAITING)) or len(self.done()) + under_way < self.trials

    def _is_taken_over(self) -> bool:
        number, fault = self._mine.trial, self._mine.fault
        is_of_the_run = isinstance(fault, optuna.TrialPruned | RunFailed | UpdateFinishedTrialError | None)
        return number is not None and is_of_the_run and self.trials_of()[number].state == TrialState.FAIL


def main() -> None:
    """Run the search in sys.argv."""
    options, space, common = parse(sys.argv[2:])
    run.set_up()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    single = [_flags({name: value}) for name, distribution in space.items() for value in _ends(distribution)]
    root, rehearsed = study.rehearse(common, *([*common, *flags] for flags in single))
    if any(one["data.val_images"] == 0 or one["trainer.limit_val_batches"] == 0 for one in rehearsed):
        raise UserError(
            "A sweep chooses by the accuracy on held-out training images, and there are none: --data.val_images 5000, "
            "and no --trainer.limit_val_batches 0"
        )
    settings = {name: value for name, value in rehearsed[0].items() if name not in OF_A_MACHINE}
    place = root / options.name
    with contextlib.nullcontext() if options.storage else study.alone_in(place):
        place.mkdir(parents=True, exist_ok=True)
        search = Search(place, options, settings | {"sweep.space": {name: repr(what) for name, what in space.items()}})
        if len(search.done()) < options.trials or search.trials_of(TrialState.WAITING, TrialState.RUNNING):
            _run_trials(search, options, space, common)
        _report(search, options, settings)


def _run_trials(search: Search, options: argparse.Namespace, space: Space, common: list[str]) -> None:
    before = len(search.done())
    with study.running(options.jobs, max(options.trials, before), before) as (pool, board):

        def objective(trial: Trial) -> float:
            params = {name: _suggest(trial, name, distribution) for name, distribution in space.items()}
            frozen = search.trials_of()[trial.number]
            first = retry.retried_trial_number(frozen)
            name = f"trial {trial.number}" if first is None else f"trial {trial.number} ({first} again)"
            parent = search.place / f"trial-{trial.number if first is None else first}"
            trial.set_user_attr("folder", str(parent))
            trial.set_user_attr("host", socket.gethostname())
            ends_early = "ends_early" in frozen.user_attrs  # before it was stopped
            reported = 0  # validations; those of before, too, are new to a trial that is repeated

            def go_on(at: workers.Progress) -> bool:
                nonlocal ends_early, reported
                board.advance(trial.number, at.fraction)
                for accuracy in at.val_acc[reported:]:
                    reported += 1
                    trial.report(accuracy, reported)
                if not ends_early and at.fraction < 1 and trial.should_prune():
                    ends_early = True
                    trial.set_user_attr("ends_early", True)
                return not ends_early

            arguments = [*common, *_flags(params), "--ckpt_path", "last"]
            arguments += ["--name", f"{options.name}/{parent.name}"]
            said = f"{name}: {_told(params)}"
            try:
                done = pool.fit(arguments, parent / "log.txt", go_on)
            except RunFailed as error:
                failed = study.failed_run(parent)
                why = failed[1] if failed else str(error).splitlines()[0]
                trial.set_user_attr("failure", why)
                board.end(trial.number, f"{said}: FAILED: {why}")
                if failed:  # which says something about the settings, and is to be learned from
                    raise optuna.TrialPruned from None
                raise
            trial.set_user_attr("folder", str(done))
            result = records.read_result(done)
            if ends_early:
                board.end(trial.number, f"{said}: ended early, val acc {result['val_acc_final']:.4f}")
                raise optuna.TrialPruned
            board.end(trial.number, f"{said}: val acc {result['val_acc']:.4f}")
            return float(result["val_acc"])

        try:
            threads = [pool.threads.submit(search.work, objective, pool.stopped) for _ in range(pool.count)]
            for future in as_completed(threads):
                future.result()
        except OF_STORAGE as error:
            raise RunFailed(
                f"The storage of the study is gone: {str(error).splitlines()[0]}\n"
                "The same command goes on when it is back."
            ) from error


def _open(url: str) -> RDBStorage:
    return RDBStorage(url, heartbeat_interval=HEARTBEAT, grace_period=SILENCE, heartbeat_stale_trial_callback=retry)


def _told(params: dict[str, Any]) -> str:
    texts = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in params.items()}
    return ", ".join(f"{end} {texts[name]}" for name, end in study.short(params).items())


def _report(search: Search, options: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Print the best trials; leave all of them, the winner's config and the pictures in the study's folder."""

    def word(trial: FrozenTrial) -> str:
        if "failure" in trial.user_attrs:
            return "failed"
        return "finished" if trial.state == TrialState.COMPLETE else "ended early"

    trials = sorted(search.done(), key=lambda trial: (trial.state != TrialState.COMPLETE, -(trial.value or 0.0)))
    table = [
        {
            "trial": trial.number,
            "state": word(trial),
            "val_acc": trial.value,
            "validations": trial.last_step or 0,
        }
        | trial.params
        | {"folder": trial.user_attrs.get("folder"), "host": trial.user_attrs.get("host")}
        | {"failure": trial.user_attrs.get("failure")}
        for trial in trials
    ]
    checkpoints.write_whole(search.place / "trials.csv", statistics.as_csv(table).encode())
    shown = [name for name in table[0] if name not in ("host", "failure")]
    rows = [[_cell(line.get(name)) for name in shown] for line in table[:10]]
    terminal.print_table([name.rpartition(".")[2] for name in shown], rows, folds=len(shown) - 1)
    states = collections.Counter(map(word, trials))
    counts = ", ".join(f"{states[state]} {state}" for state in ("finished", "ended early", "failed"))
    print(f"\n{len(trials)} trials: {counts}; all in {search.place / 'trials.csv'}")
    if not any(trial.state == TrialState.COMPLETE for trial in trials):
        print("None came to its end, so there is no winner.", flush=True)
        return
    best = trials[0]
    winner = search.place / "winner.yaml"
    checkpoints.write_whole(winner, _config(best, winner, len(trials), options.name, settings).encode())
    matplotlib.use("Agg")
    plots: dict[str, Callable[[optuna.Study], Any]] = {
        "history": optuna.visualization.matplotlib.plot_optimization_history,
        "importance": optuna.visualization.matplotlib.plot_param_importances,
    }
    for name, plot in plots.items():
        try:
            plot(search.study).figure.savefig(search.place / f"{name}.png", dpi=120, bbox_inches="tight")
        except (ValueError, RuntimeError) as error:  # one trial, or trials that are all alike
            print(f"no picture of {name}: {error}")
    print(f"the winner, trial {best.number}: {shlex.join(['fit', '--config', str(winner)])}", flush=True)


def _config(best: FrozenTrial, file: Path, of: int, name: str, settings: dict[str, Any]) -> str:
    """What differs from the defaults in the winner's settings, as a config."""
    defaults = study.rehearse(DEFAULTS)[1][0]
    differ = {key: value for key, value in settings.items() if value != defaults.get(key)}
    content = folder.nested({"name": f"{name}-winner", **differ, **best.params})
    return (
        f"# The best of {of} trials of the sweep {name}: trial {best.number}, validation accuracy {best.value:.4f}.\n"
        f"#\n#     python -m bn_lightning fit --config {file.as_posix()}\n{yaml.safe_dump(content, sort_keys=False)}"
    )


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
