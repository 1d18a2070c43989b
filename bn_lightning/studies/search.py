"""The search of a sweep: storage, trials, and retries of trials whose process died."""

import argparse
import copy
import json
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import optuna
import sqlalchemy
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import FrozenTrial, Trial, TrialState

from bn_lightning.errors import RunFailed, UserError
from bn_lightning.runs import result
from bn_lightning.studies import code, study, workers
from bn_lightning.training import checkpoints

SAMPLERS: dict[str, Callable[[], optuna.samplers.BaseSampler]] = {
    # constant_liar gives running trials a bad value, so that several processes do not
    # try nearly the same settings.
    "tpe": lambda: optuna.samplers.TPESampler(constant_liar=True),
    "random": optuna.samplers.RandomSampler,
}
PRUNERS: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
    # At each rung, only the best third of the trials continues. See Li et al. 2020, "A
    # System for Massively Parallel Hyperparameter Tuning",
    # https://arxiv.org/abs/1810.05934.
    "asha": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3),
    "none": optuna.pruners.NopPruner,
}

# Both are in seconds. If the last heartbeat of a trial is older than the grace period,
# its process counts as dead, and another process retries the trial.
HEARTBEAT_INTERVAL, GRACE_PERIOD = 2, 15

# User attributes of a trial: the code of its run, and why the machine failed during it.
CODE, MACHINE_FAILURE = "code", "machine_failure"

Direction = Literal["minimize", "maximize"]
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
STORAGE_ERRORS = (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError)

# Optuna warns that heartbeats and retries are experimental.
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
# It also warns about choices such as dicts. The storages of a sweep support all plain data.
warnings.filterwarnings("ignore", "Choices for a categorical distribution")
retry = RetryHeartbeatStaleTrialCallback()


class Search:
    """The trials of one study, in a storage that several processes may share.

    Args:
        folder: folder of the study.
        options: command-line options of `sweep`.
        direction: "minimize" or "maximize".
        settings: settings that must be the same when the study is resumed.
        defaults: default values of the settings. They are used for settings that did
            not exist when the study was started.

    Raises:
        UserError: the storage cannot be used, the study was started with other
            settings, or the folder contains the runs of another study.
    """

    def __init__(
        self,
        folder: Path,
        options: argparse.Namespace,
        direction: Direction,
        settings: Mapping[str, Any],
        defaults: Mapping[str, Any],
    ) -> None:
        self.folder, self.trials = folder, options.trials
        self.study, is_new = _open_study(folder, options, direction)
        now = json.loads(result.to_json(dict(settings)))
        if is_new:
            self.study.set_user_attr("id", uuid.uuid4().hex)
            self.study.set_user_attr("settings", now)
        else:
            before = self.study.user_attrs["settings"]
            study.refuse_changes(repr(options.name), before, now, defaults)
        self._refuse_runs_of_another_study()
        # A thread holds this lock while it decides whether to start a trial, and starts
        # it. Without the lock, two threads could both start the last trial.
        self._start_lock = threading.Lock()
        # Values of each thread: `trial` is the number of its trial, `error` the
        # exception of the objective, and `holds_lock` whether it holds the lock.
        self._local = threading.local()
        self._requeue_lost_trials()

    def _refuse_runs_of_another_study(self) -> None:
        """Refuse a folder that contains the runs of another study.

        The trials of both studies could have the same numbers, and thus the same
        folders.
        """
        own_id, file = self.study.user_attrs["id"], self.folder / "study-id"
        if not file.exists() and not any(self.folder.glob("trial-*")):
            checkpoints.write_atomically(file, own_id.encode())
        if not file.exists() or file.read_text() != own_id:
            raise UserError(
                f"The folder {str(self.folder)!r} contains the runs of another study. The "
                "trials of that study are not in the storage of this command.\n"
                "Use the storage of that study (--storage URL), or start another study: --name NAME"
            )

    def _requeue_lost_trials(self) -> None:
        """Queue a retry of each trial whose process died, if it has no retry yet.

        The process that marks such a trial as failed also queues its retry, but it may
        die between these two steps.
        """
        retried = self._retried()
        for trial in self.get_trials(TrialState.FAIL):
            if "failure" in trial.user_attrs or trial.number in retried:
                continue
            if MACHINE_FAILURE in trial.user_attrs:
                self._repeat(trial, without=(MACHINE_FAILURE,))
            else:
                completed = trial.datetime_complete
                age = time.time() - completed.timestamp() if completed else 0
                # If the trial was marked recently, another process may be about to
                # queue its retry.
                if age > GRACE_PERIOD:
                    retry(self.study, trial)

    def _retried(self) -> set[int]:
        """Return the numbers of the trials that another trial repeats."""
        return {number for trial in self.get_trials() for number in retry.retry_history(trial)}

    def _repeat(self, trial: FrozenTrial, without: Collection[str]) -> None:
        """Queue a trial with the same settings, in the same folder.

        Args:
            without: user attributes that do not hold for the repetition.
        """
        repeated = copy.deepcopy(trial)
        repeated.user_attrs = {
            name: value for name, value in trial.user_attrs.items() if name not in without
        }
        retry(self.study, repeated)

    def repeat_stale_trials(self, stale: Mapping[int, str]) -> None:
        """Queue the trials with the given numbers again. They are no longer reported."""
        for trial in self.done():
            if trial.number in stale:
                self._repeat(trial, without=trial.user_attrs)

    def stale_trials(self, code_of: Callable[[Mapping[str, Any]], code.Code]) -> dict[int, str]:
        """Return for each trial of other code how the current code differs."""
        found = {}
        for trial in self.done():
            before = code.Code(**trial.user_attrs.get(CODE, {}))
            if reason := code_of(trial.params).difference(before):
                found[trial.number] = reason
        return found

    def get_trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Return the trials with the given states, or without states, all trials."""
        return self.study.get_trials(deepcopy=False, states=states or None)

    def done(self) -> list[FrozenTrial]:
        """Return the trials that were completed or pruned, or whose run failed.

        Trials that are repeated are not included, nor are those whose process died,
        because they are retried.
        """
        retried = self._retried()
        found = self.get_trials(*FINISHED)
        for trial in self.get_trials(TrialState.FAIL):
            if {"failure", MACHINE_FAILURE} & trial.user_attrs.keys():
                found.append(trial)
        return [trial for trial in found if trial.number not in retried]

    def run_trials(self, objective: Callable[[Trial], float], stopped: threading.Event) -> None:
        """Run trials until enough trials are done and no trial is running.

        Several threads may call this method at the same time.

        Args:
            objective: trains the run of a trial, and returns the value of its metric.
            stopped: ends the loop before the next trial when it is set.

        Raises:
            RunFailed: the disk is full.
        """
        while not stopped.is_set():
            self._raise_full_disk()
            self._start_lock.acquire()
            self._local.holds_lock, self._local.trial, self._local.error = True, None, None

            def run_trial(trial: Trial) -> float:
                self._local.trial = trial.number
                self._release_start_lock()
                try:
                    return objective(trial)
                except Exception as error:
                    self._local.error = error
                    raise

            try:
                if self._is_trial_due():
                    self.study.optimize(run_trial, n_trials=1, catch=RunFailed)
                    continue
            except workers.Interrupted:
                retry(self.study, self.study.get_trials()[self._local.trial])
                raise
            except (ValueError, UpdateFinishedTrialError):
                # Optuna raises these errors if another process has already marked the
                # trial as failed.
                if not self._was_taken_over():
                    raise
                print(
                    f"trial {self._local.trial} had no heartbeat for {GRACE_PERIOD} s; "
                    "another process retries it",
                    flush=True,
                )
                continue
            finally:
                self._release_start_lock()
            if not self.get_trials(TrialState.RUNNING):
                return
            # If the process of a running trial dies, this process has to retry it.
            stopped.wait(1)

    def _raise_full_disk(self) -> None:
        """Raise RunFailed if the disk was full in this thread's trial: others would fail too."""
        error = getattr(self._local, "error", None)
        if isinstance(error, workers.MachineFailure) and error.is_disk_full:
            raise RunFailed(study.describe_full_disk(error)) from error

    def _release_start_lock(self) -> None:
        if self._local.holds_lock:
            self._local.holds_lock = False
            self._start_lock.release()

    def _is_trial_due(self) -> bool:
        """Return whether another trial has to be started.

        Before that, trials of dead processes are marked as failed, and their retries
        are queued.
        """
        fail_stale_trials(self.study)
        running = len(self.get_trials(TrialState.RUNNING))
        waiting = self.get_trials(TrialState.WAITING)
        return bool(waiting) or len(self.done()) + running < self.trials

    def _was_taken_over(self) -> bool:
        """Return whether another process has marked this thread's trial as failed."""
        number, error = self._local.trial, self._local.error
        expected = optuna.TrialPruned | RunFailed | UpdateFinishedTrialError | None
        if number is None or not isinstance(error, expected):
            return False
        return bool(self.get_trials()[number].state == TrialState.FAIL)


def _open_study(
    folder: Path, options: argparse.Namespace, direction: Direction
) -> tuple[optuna.Study, bool]:
    """Create or load the study, and return whether it is new."""
    url = options.storage or f"sqlite:///{(folder / 'study.db').as_posix()}"
    if url.startswith(("postgresql://", "postgres://")):
        # The extra `study` installs the driver psycopg.
        url = f"postgresql+psycopg://{url.partition('://')[2]}"
    try:
        try:
            storage = _open_storage(url)
        except sqlalchemy.exc.DatabaseError:
            # If two processes create the tables at the same time, one of them fails. It
            # then opens the existing tables.
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
            return found, not _has_settings(found)
    except (*STORAGE_ERRORS, ImportError, ValueError, RuntimeError) as error:
        raise UserError(
            f"The storage of the study cannot be used: {str(error).splitlines()[0]}\n"
            "Use a server, --storage postgresql://USER@HOST/DATABASE with the password in the file "
            "that PGPASSFILE names, or remove --storage to use a file."
        ) from error


def _open_storage(url: str) -> RDBStorage:
    return RDBStorage(
        url,
        heartbeat_interval=HEARTBEAT_INTERVAL,
        grace_period=GRACE_PERIOD,
        heartbeat_stale_trial_callback=retry,
    )


def _has_settings(found: optuna.Study) -> bool:
    """Return whether the process that created the study has stored its settings.

    Wait up to 5 seconds for the settings. If they are missing after this time, that
    process is assumed to have died.
    """
    for _ in range(5):
        if "settings" in found.user_attrs:
            return True
        time.sleep(1)
    return False
