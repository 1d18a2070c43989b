"""The objective of a sweep: train one trial, report it to the pruner, return its metric."""

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import optuna
from optuna.trial import Trial

from bn_lightning.errors import RunFailed
from bn_lightning.runs import result
from bn_lightning.studies import code, study, workers
from bn_lightning.studies import space as spaces
from bn_lightning.studies.progress import StudyProgress
from bn_lightning.studies.search import CODE, MACHINE_FAILURE, Search, retry
from bn_lightning.studies.space import Space
from bn_lightning.studies.statistics import Selection


class Objective:
    """Trains with the settings of a trial, and returns the metric that the task selects by.

    Args:
        code_of: returns the current code of a trial with the given parameters.
    """

    def __init__(
        self,
        search: Search,
        space: Space,
        common: Sequence[str],
        selection: Selection,
        pool: workers.Workers,
        progress: StudyProgress,
        code_of: Callable[[Mapping[str, Any]], code.Code] = lambda params: code.Code(),
    ) -> None:
        self.code_of = code_of
        self.search, self.space, self.common = search, space, common
        self.selection, self.pool, self.progress = selection, pool, progress

    def __call__(self, trial: Trial) -> float:
        """Train the trial, and return its validation metric.

        Raises:
            TrialPruned: the trial was ended early, or its loss or metric is not finite.
            RunFailed: the run failed for a reason other than its loss.
            MachineFailure: the machine failed. The next command tries the trial again.
        """
        params = spaces.suggest(trial, self.space)
        frozen = self.search.get_trials()[trial.number]
        first = retry.retried_trial_number(frozen)
        number = trial.number if first is None else first
        retried = "" if first is None else f" (retry of trial {first})"
        parent = self.search.folder / f"trial-{number}"
        trial.set_user_attr("folder", str(parent))
        trial.set_user_attr("host", socket.gethostname())
        current = self.code_of(params)
        study.set_aside_stale_runs(parent, current)
        trial.set_user_attr(CODE, asdict(current))
        pruning = _Pruning(trial, self.progress, "ends_early" in frozen.user_attrs)
        name = f"{self.search.study.study_name}/{parent.name}"
        arguments = [*self.common, *spaces.flags(params), "--ckpt_path", "last", "--name", name]
        line = f"trial {trial.number}{retried}: {describe(params)}"
        try:
            folder = study.fit(self.pool, arguments, parent / "log.txt", pruning)
        except workers.MachineFailure as error:
            reason = str(error).splitlines()[0]
            trial.set_user_attr(MACHINE_FAILURE, reason)
            self.progress.end(trial.number, f"{line}: FAILED: {reason}")
            raise
        except RunFailed as error:
            failed = study.failed_run(parent)
            reason = failed[1] if failed else str(error).splitlines()[0]
            self._end_failed(trial, line, reason)
            if failed:
                # The settings caused the failure. The sampler learns from a pruned
                # trial.
                raise optuna.TrialPruned from None
            raise
        trial.set_user_attr("folder", str(folder))
        trial.set_user_attr(CODE, asdict(code.recorded(folder)))
        found, validated = result.read_result(folder), pruning.reported > 0
        return self._value(trial, line, found, validated, pruning.ends_early)

    def _value(
        self, trial: Trial, line: str, found: dict[str, Any], validated: bool, ended_early: bool
    ) -> float:
        """Return the metric from result.json, and print it."""
        metric, label = self.selection.metric, self.selection.label
        value = found[f"{metric}_final" if ended_early else metric]
        # result.json has null for NaN and infinity.
        if value is None:
            # For example, --trainer.max_time has ended the run.
            reason = f"non-finite {label}" if validated else "the run ended before its validation"
            self._end_failed(trial, line, reason)
            raise optuna.TrialPruned
        if ended_early:
            self.progress.end(trial.number, f"{line}: ended early, {label} {value:.4f}")
            raise optuna.TrialPruned
        self.progress.end(trial.number, f"{line}: {label} {value:.4f}")
        return float(value)

    def _end_failed(self, trial: Trial, line: str, reason: str) -> None:
        trial.set_user_attr("failure", reason)
        self.progress.end(trial.number, f"{line}: FAILED: {reason}")


class _Pruning:
    """Reports the validations of a run to its trial, and ends the run if the pruner decides so.

    Attributes:
        ends_early: whether the pruner has ended the run, now or before the run was
            resumed.
    """

    def __init__(self, trial: Trial, progress: StudyProgress, ends_early: bool) -> None:
        self.trial, self.progress, self.ends_early = trial, progress, ends_early
        # A retried trial is a new trial: it has none of the validations from before the
        # resume.
        self.reported = 0

    def __call__(self, at: workers.Progress) -> bool:
        self.progress.advance(self.trial.number, at.fraction)
        for value in at.selected[self.reported :]:
            self.reported += 1
            self.trial.report(value, self.reported)
        if not self.ends_early and at.fraction < 1 and self.trial.should_prune():
            self.ends_early = True
            self.trial.set_user_attr("ends_early", True)
        return not self.ends_early


def describe(params: Mapping[str, Any]) -> str:
    """Return the settings of a trial as text, such as `lr 0.1, batch_size 64`."""
    names = study.short_names(params)
    return ", ".join(f"{names[name]} {_number(value)}" for name, value in params.items())


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
