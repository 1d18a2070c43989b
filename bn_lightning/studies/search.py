"""The search of a sweep: its storage, its trials, and taking over those of processes that died."""

import argparse
import json
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import optuna
import sqlalchemy
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import FrozenTrial, Trial, TrialState

from bn_lightning.errors import RunFailed, UserError
from bn_lightning.runs import result
from bn_lightning.studies import study, workers
from bn_lightning.training import checkpoints

SAMPLERS: dict[str, Callable[[], optuna.samplers.BaseSampler]] = {
    # Running trials count as bad ones, so that no two processes try nearly the same.
    "tpe": lambda: optuna.samplers.TPESampler(constant_liar=True),
    "random": optuna.samplers.RandomSampler,
}
PRUNERS: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
    # Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning": the best third of
    # each rung continues.
    "asha": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3),
    "none": optuna.pruners.NopPruner,
}

# Seconds between two signs of life of a process, and the silence after which another process takes
# over its trials.
HEARTBEAT, SILENCE = 2, 15

Direction = Literal["minimize", "maximize"]
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
STORAGE_ERRORS = (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError)

# Taking over trials has been experimental since 2021.
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
retry = RetryHeartbeatStaleTrialCallback()


class Search:
    """The trials of one study, in a storage that several processes may share.

    Args:
        place: the folder of the study.
        options: of `sweep`.
        direction: `minimize` or `maximize`.
        settings: what must not change when the study is resumed.
        defaults: what settings had before they existed.

    Raises:
        UserError: a storage that cannot be used, or a study with other settings.
    """

    def __init__(
        self,
        place: Path,
        options: argparse.Namespace,
        direction: Direction,
        settings: Mapping[str, Any],
        defaults: Mapping[str, Any],
    ) -> None:
        self.place, self.trials = place, options.trials
        self.study, is_new = _open_study(place, options, direction)
        now = json.loads(result.to_json(dict(settings)))
        if is_new:
            self.study.set_user_attr("id", uuid.uuid4().hex)
            self.study.set_user_attr("settings", now)
        else:
            before = self.study.user_attrs["settings"]
            study.refuse_changes(repr(options.name), before, now, defaults)
        self._refuse_runs_of_another_study()
        # A trial that one thread begins must be seen by the others.
        self._begins = threading.Lock()
        self._mine = threading.local()
        self._requeue_lost()

    def _refuse_runs_of_another_study(self) -> None:
        """Refuse a folder with trials of another storage: their numbers are the same."""
        mine, file = self.study.user_attrs["id"], self.place / "study-id"
        if not file.exists() and not any(self.place.glob("trial-*")):
            checkpoints.write_whole(file, mine.encode())
        if not file.exists() or file.read_text() != mine:
            raise UserError(
                f"{str(self.place)!r} has the runs of another study, from another storage.\n"
                "Use its storage, or begin another study: --name NAME"
            )

    def _requeue_lost(self) -> None:
        """Queue trials that failed with their process, if it died before it could queue them."""
        trials = self.study.get_trials(deepcopy=False)
        retried = {number for trial in trials for number in retry.retry_history(trial)}
        for trial in trials:
            is_lost = trial.state == TrialState.FAIL and "failure" not in trial.user_attrs
            if is_lost and trial.number not in retried:
                completed = trial.datetime_complete
                age = time.time() - completed.timestamp() if completed else 0
                # A younger one may be queued by another process at this moment.
                if age > SILENCE:
                    retry(self.study, trial)

    def trials_of(self, *states: TrialState) -> list[FrozenTrial]:
        """Return the trials with these states, or all."""
        return self.study.get_trials(deepcopy=False, states=states or None)

    def done(self) -> list[FrozenTrial]:
        """Return the trials that ended, also with a failure of their run.

        Those whose process has died are not among them: they are repeated.
        """
        failed = [t for t in self.trials_of(TrialState.FAIL) if "failure" in t.user_attrs]
        return [*self.trials_of(*FINISHED), *failed]

    def work(self, objective: Callable[[Trial], float], stopped: threading.Event) -> None:
        """Run trials until there are enough and none is running. For several threads."""
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
            except (ValueError, UpdateFinishedTrialError):  # of a trial that has ended already
                if not self._is_taken_over():
                    raise
                print(
                    f"trial {self._mine.trial} was silent, and another process has taken it over",
                    flush=True,
                )
                continue
            finally:
                self._has_begun()
            if not self.trials_of(TrialState.RUNNING):
                return
            stopped.wait(1)  # if the process of a running trial dies, the trial is taken over

    def _has_begun(self) -> None:
        if self._mine.begins:
            self._mine.begins = False
            self._begins.release()

    def _is_one_missing(self) -> bool:
        fail_stale_trials(self.study)
        running = len(self.trials_of(TrialState.RUNNING))
        waiting = self.trials_of(TrialState.WAITING)
        return bool(waiting) or len(self.done()) + running < self.trials

    def _is_taken_over(self) -> bool:
        number, fault = self._mine.trial, self._mine.fault
        of_the_run = optuna.TrialPruned | RunFailed | UpdateFinishedTrialError | None
        if number is None or not isinstance(fault, of_the_run):
            return False
        return bool(self.trials_of()[number].state == TrialState.FAIL)


def _open_study(
    place: Path, options: argparse.Namespace, direction: Direction
) -> tuple[optuna.Study, bool]:
    """Create or load the study, and return whether it is new."""
    url = options.storage or f"sqlite:///{(place / 'study.db').as_posix()}"
    if url.startswith(("postgresql://", "postgres://")):
        # The driver of the extra `study`.
        url = f"postgresql+psycopg://{url.partition('://')[2]}"
    try:
        try:
            storage = _open_storage(url)
        except sqlalchemy.exc.DatabaseError:
            # If two processes create the tables at once, one of them fails.
            time.sleep(1)
            storage = _open_storage(url)
        arguments = {
            "study_name": options.name,
            "storage": storage,
            "sampler": SAMPLERS[options.sampler](),
            "pruner": PRUNERS[options.pruner](),
        }
        try:
            return optuna.create_study(**arguments, direction=direction), True
        except optuna.exceptions.DuplicatedStudyError:
            found = optuna.load_study(**arguments)
            return found, not _is_described(found)
    except (*STORAGE_ERRORS, ImportError, ValueError, RuntimeError) as error:
        raise UserError(
            f"The storage of the study cannot be used: {str(error).splitlines()[0]}\n"
            "It is a file by default; a server: "
            "--storage postgresql://USER:PASSWORD@HOST/DATABASE"
        ) from error


def _open_storage(url: str) -> RDBStorage:
    return RDBStorage(
        url,
        heartbeat_interval=HEARTBEAT,
        grace_period=SILENCE,
        heartbeat_stale_trial_callback=retry,
    )


def _is_described(found: optuna.Study) -> bool:
    """Return whether the process that created the study has stored its settings.

    Waits for that, but not longer than a living process would take.
    """
    for _ in range(5):
        if "settings" in found.user_attrs:
            return True
        time.sleep(1)
    return False
