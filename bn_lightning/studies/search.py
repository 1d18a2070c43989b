"""The search of a sweep: storage, trials, and retries of trials whose process died."""

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
    # Running trials count as bad ones, so that processes do not try nearly the same
    # settings.
    "tpe": lambda: optuna.samplers.TPESampler(constant_liar=True),
    "random": optuna.samplers.RandomSampler,
}
PRUNERS: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
    # Only the best third of each rung continues. Li et al. 2020, "A System for
    # Massively Parallel Hyperparameter Tuning", https://arxiv.org/abs/1810.05934.
    "asha": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3),
    "none": optuna.pruners.NopPruner,
}

# In seconds. A process whose last heartbeat is older than the grace period is
# considered dead, and another process retries its trials.
HEARTBEAT_INTERVAL, GRACE_PERIOD = 2, 15

Direction = Literal["minimize", "maximize"]
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
STORAGE_ERRORS = (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError)

# Optuna marks heartbeats and retries as experimental.
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
retry = RetryHeartbeatStaleTrialCallback()


class Search:
    """The trials of one study, in a storage that several processes may share.

    Args:
        folder: folder of the study.
        options: command-line options of `sweep`.
        direction: "minimize" or "maximize".
        settings: settings that must be the same when the study is resumed.
        defaults: defaults of the settings, for those that did not exist when the study
            started.

    Raises:
        UserError: the storage cannot be used, or the study has other settings.
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
        # Only one thread at a time decides whether to start a trial, and starts it.
        # Otherwise two threads could both start the last trial.
        self._start_lock = threading.Lock()
        # The trial of each thread.
        self._local = threading.local()
        self._requeue_lost_trials()

    def _refuse_runs_of_another_study(self) -> None:
        """Refuse a folder with the runs of another storage, whose trials have the same numbers."""
        own_id, file = self.study.user_attrs["id"], self.folder / "study-id"
        if not file.exists() and not any(self.folder.glob("trial-*")):
            checkpoints.write_atomically(file, own_id.encode())
        if not file.exists() or file.read_text() != own_id:
            raise UserError(
                f"The folder {str(self.folder)!r} contains the runs of another study, whose trials "
                "are in another storage.\n"
                "Use that storage (--storage URL), or start another study: --name NAME"
            )

    def _requeue_lost_trials(self) -> None:
        """Queue a retry of each trial that failed with its process and has no retry yet.

        The process that marked the trial as failed normally queues the retry, but it
        may have died in between.
        """
        trials = self.study.get_trials(deepcopy=False)
        retried = {number for trial in trials for number in retry.retry_history(trial)}
        for trial in trials:
            is_lost = trial.state == TrialState.FAIL and "failure" not in trial.user_attrs
            if is_lost and trial.number not in retried:
                completed = trial.datetime_complete
                age = time.time() - completed.timestamp() if completed else 0
                # Another process may still queue the retry of a trial that failed
                # recently.
                if age > GRACE_PERIOD:
                    retry(self.study, trial)

    def get_trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Return the trials with these states, or all trials."""
        return self.study.get_trials(deepcopy=False, states=states or None)

    def done(self) -> list[FrozenTrial]:
        """Return the trials that are finished, pruned, or failed with their run.

        Trials whose process died are not included, because they are retried.
        """
        failed = [t for t in self.get_trials(TrialState.FAIL) if "failure" in t.user_attrs]
        return [*self.get_trials(*FINISHED), *failed]

    def run_trials(self, objective: Callable[[Trial], float], stopped: threading.Event) -> None:
        """Run trials until there are enough and none is running. Several threads may call this."""
        while not stopped.is_set():
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
                # Optuna raises these errors for a trial that is already marked as
                # failed.
                if not self._was_taken_over():
                    raise
                print(
                    f"trial {self._local.trial}: no heartbeat for {GRACE_PERIOD} s; "
                    "another process retries it",
                    flush=True,
                )
                continue
            finally:
                self._release_start_lock()
            if not self.get_trials(TrialState.RUNNING):
                return
            # A running trial needs a retry if its process dies.
            stopped.wait(1)

    def _release_start_lock(self) -> None:
        if self._local.holds_lock:
            self._local.holds_lock = False
            self._start_lock.release()

    def _is_trial_due(self) -> bool:
        """Return whether another trial has to be started."""
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
        # psycopg is the driver in the extra `study`.
        url = f"postgresql+psycopg://{url.partition('://')[2]}"
    try:
        try:
            storage = _open_storage(url)
        except sqlalchemy.exc.DatabaseError:
            # If two processes create the tables at the same time, one of them fails.
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
            "Give a server as --storage postgresql://USER:PASSWORD@HOST/DATABASE, or remove "
            "--storage to use a file."
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

    Wait up to 5 seconds for them. A process that takes longer has died.
    """
    for _ in range(5):
        if "settings" in found.user_attrs:
            return True
        time.sleep(1)
    return False
