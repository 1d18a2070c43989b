"""LearningRateFinder and BatchSizeFinder: a new run searches, a resumed run has what it found."""

import csv

import pytest
import torch
import yaml

from bn_lightning.runs import finders
from tests.conftest import QUICK, run_here
from tests.runs.test_trainer import rehearsed

LOGGER = ("CSVLogger", "--trainer.logger.save_dir", "logs", "--trainer.logger.version", 0)
FEW = (*QUICK, "--trainer.limit_val_batches", 1, "--trainer.limit_test_batches", 1)
SEARCHES = (
    *("--trainer.callbacks+=BatchSizeFinder", "--trainer.callbacks.init_val", 64),
    *("--trainer.callbacks.max_trials", 2, "--trainer.callbacks+=LearningRateFinder"),
    *("--trainer.callbacks.num_training_steps", 20),
)


def state(run):
    """Return the checkpoint of a run, the optimizer's settings, and what was found."""
    last = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    found = yaml.safe_load((run / "resumed-1.yaml").read_text())
    return last, last["optimizer_states"][0]["param_groups"][0], found


def rows(folder):
    with (folder / "logs/lightning_logs/version_0/metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_has_the_found_settings_and_keeps_its_metrics_csv(tmp_path):
    logger = ("--trainer.logger", *LOGGER)
    run_here("fit", *FEW, "--trainer.max_steps", 20, *SEARCHES, *logger, cwd=tmp_path)
    run = tmp_path / "runs/lenet/0"
    _, optimizer, found = state(run)
    assert found["data"] == {"batch_size": 128}
    assert found["model"] == {"lr": optimizer["lr"]} != {"lr": 1.0}
    before = rows(tmp_path)

    done = run_here("fit", "--resume", run, "--trainer.max_steps", 30, cwd=tmp_path)
    assert "LearningRateFinder is skipped" in done.stdout
    assert "changed: --trainer.max_steps 30 (was 20)" in done.stdout
    assert "--model.lr" not in done.stdout and "--data.batch_size" not in done.stdout
    last, again, _ = state(run)
    assert last["global_step"] == 30
    assert last["datamodule_hyper_parameters"]["batch_size"] == 128
    assert last["hyper_parameters"]["lr"] == again["lr"] == optimizer["lr"]
    assert rows(tmp_path)[: len(before)] == before


@pytest.mark.slow
def test_a_schedule_is_planned_with_the_found_settings(tmp_path):
    """The sample has 5,500 training images, so 43 batches of 128."""
    schedule = ("--model.scheduler", "OneCycleLR", "--trainer.max_epochs", 1)
    run_here("fit", *FEW, *schedule, *SEARCHES, cwd=tmp_path)
    last, optimizer, found = state(tmp_path / "runs/lenet/0")
    assert optimizer["max_lr"] == found["model"]["lr"]
    assert last["lr_schedulers"][0]["total_steps"] == last["global_step"] == 43


def test_only_callbacks_that_search_before_training_are_skipped():
    class Later(finders.LearningRateFinder):
        def on_fit_start(self, trainer, pl_module):
            pass

    early = finders.BatchSizeFinder()
    assert finders.in_callbacks([Later(), early]) == [early]


def test_finders_search_only_without_a_checkpoint(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new = rehearsed(*SEARCHES)
    assert len(finders.in_callbacks(new.trainer.callbacks)) == 2
    assert new.parts.found_settings in new.trainer.callbacks
    loaded = rehearsed(*SEARCHES, "--ckpt_path", trained[0] / "checkpoints/best.ckpt")
    assert finders.in_callbacks(loaded.trainer.callbacks) == []
    assert loaded.parts.skipped == ["BatchSizeFinder", "LearningRateFinder"]
