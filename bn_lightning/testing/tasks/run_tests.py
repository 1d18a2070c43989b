"""Tests of whole runs: their files, resume, reproduction, and two processes."""

import json

import pytest

from bn_lightning.errors import UserError
from bn_lightning.norms.sync import LayerSync
from bn_lightning.testing.failures import fail, fail_if, found
from bn_lightning.testing.tasks import outcomes, state, steps
from bn_lightning.testing.tasks.base import FittedTests
from bn_lightning.testing.tasks.fitted import Fitted
from bn_lightning.testing.tasks.runs import Run, Runs
from bn_lightning.training.task import Stage

# Two runs in float64. Metrics are sums in float32.
PROCESSES = (1e-5, 1e-8)
STAGES: tuple[Stage, ...] = ("train", "val", "test")


class RunTests(FittedTests):
    """A run leaves its results, and can be resumed, repeated and shared by processes."""

    def test_a_run_leaves_its_results_and_checkpoints(self, runs: Runs, fitted: Fitted) -> None:
        run = _finished(runs)
        names = ["config.yaml", "result.json", "checkpoints/last.ckpt"]
        if not fitted.data.validates_on_test_set:
            names.append("checkpoints/best.ckpt")
        missing = [name for name in names if not (run.folder / name).is_file()]
        if missing:
            fail(f"A finished run has not left {', '.join(missing)}.", f"{run.folder}.")
        result = json.loads((run.folder / "result.json").read_text(encoding="utf-8"))
        metrics = [name for stage in STAGES for name in fitted.task.names(stage)]
        fail_if(
            [f"{m} is {result.get(m)!r}" for m in metrics if not isinstance(result.get(m), float)],
            "result.json lacks metrics of the task",
            "methods of Task that are overridden and do not call super(), such as "
            "on_validation_epoch_end(), and metrics that are not one number.",
        )

    def test_a_killed_run_is_resumed_bit_identically(self, runs: Runs, fitted: Fitted) -> None:
        first, killed = _finished(runs), runs.killed
        if not runs.was_killed:
            _refuse_failed(killed, "A run fails before it can be killed")
            pytest.skip("An epoch has too few batches: use a smaller --data.batch_size.")
        _refuse_failed(
            runs.resumed,
            "A run that was killed cannot be resumed",
            "methods that save and load checkpoints, such as on_load_checkpoint().",
        )
        fail_if(
            outcomes.differences(first.outcome, runs.resumed.outcome),
            "A run that was killed and resumed has another outcome than the uninterrupted one",
            "state that is not in the checkpoint, such as attributes that change from step to "
            "step, and generators of your own. Random numbers must come from the global "
            f"generators of torch, NumPy and Python.{_candidates(fitted)}",
        )

    def test_the_settings_of_a_run_reproduce_it(self, runs: Runs, fitted: Fitted) -> None:
        first = _finished(runs)
        resumed: Run | None = vars(runs).get("resumed")
        # The resumed run has the same settings. If it is equal, nothing more is to be run.
        if resumed and not resumed.has_failed:
            wrong = outcomes.differences(first.outcome, resumed.outcome)
            if not wrong:
                return
        _refuse_failed(runs.repeated, "`fit --config config.yaml` fails with the file of a run")
        fail_if(
            outcomes.differences(first.outcome, runs.repeated.outcome),
            "`fit --config config.yaml` with the file of a run has another outcome than the run",
            "random numbers without a seed, such as those of numpy.random.default_rng(), the time, "
            f"hash(), and the order of a set.{_candidates(fitted)}",
        )

    def test_two_processes_train_as_one(self, runs: Runs, fitted: Fitted) -> None:
        _skip_unless_shared(fitted)
        _refuse_failed(
            runs.one_process,
            "A run with --trainer.precision 64-true fails",
            "tensors with a fixed dtype or device in the network and in step(). Create them like "
            "the input: torch.zeros(..., dtype=x.dtype, device=x.device).",
        )
        _refuse_failed(runs.two_processes, "A run with --trainer.devices 2 fails")
        fail_if(
            outcomes.differences(runs.one_process.outcome, runs.two_processes.outcome, *PROCESSES),
            "Two processes that share each batch have another outcome than one",
            "a loss in step() that is not the mean over the samples, values that are not reduced "
            "(self.log() needs sync_dist=True), layers that use statistics of the batch, and "
            f"random numbers of the data.{_candidates(fitted)}",
        )


def _candidates(fitted: Fitted) -> str:
    """Return the state that is not in the checkpoint, and the generators of the data."""
    return found([*state.outside(fitted.task), *fitted.generators])


def _finished(runs: Runs) -> Run:
    """Return the finished run; let the test fail if it has failed."""
    _refuse_failed(
        runs.finished,
        "A short run of `fit` fails",
        "the last lines. A KeyError with the name of a metric: a method of Task, such as "
        "on_test_epoch_end(), is overridden and does not call super().",
    )
    return runs.finished


def _refuse_failed(run: Run, what: str, where: str = "the code that raises this error.") -> None:
    if run.has_failed:
        fail(f"{what}:\n{run.error}", where)


def _skip_unless_shared(fitted: Fitted) -> None:
    """Skip the test if two processes need not equal one."""
    if not fitted.is_exact:
        pytest.skip(
            "The training loader is not an ExactLoader, so two processes get other batches than "
            "one. bn_lightning.ExactDataLoader shares them."
        )
    try:
        LayerSync().synchronize(fitted.restore().task.network, "cpu")
    except UserError as error:
        pytest.skip(str(error).partition("\n")[0])
    # Each process has random numbers of its own.
    if steps.is_random(fitted.restore().task, fitted.batch):
        pytest.skip("The loss in training is random (dropout?), so that of two processes differs.")
