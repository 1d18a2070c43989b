"""The parts that a run adds to Lightning's Trainer."""

import sys

import pytest
from jsonargparse import Namespace
from lightning.pytorch.callbacks import LearningRateMonitor, TQDMProgressBar

from bn_lightning import (
    ClosingPictures,
    LayerSync,
    NormMonitor,
    UserError,
    WholeCheckpointIO,
    cli,
)
from bn_lightning.monitoring.progress_bar import MetricsProgressBar
from bn_lightning.runs import run, trainer
from bn_lightning.runs.records import Records
from tests.conftest import BRIEF
from tests.support.runs import result_of

FRIEDMAN = "tests.projects.friedman.experiment:EXPERIMENT"


def rehearsed(*arguments, reference=cli.EXPERIMENT, command="fit"):
    """Build the objects of a run without training."""
    given = [command, "--trainer.accelerator", "cpu", *map(str, arguments)]
    return run.command_line(given, reference, run.Rehearsal)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def kinds(built):
    return [type(callback) for callback in built.parts.callbacks]


def test_the_task_declares_how_the_best_checkpoint_is_selected():
    for reference, monitor, mode in (
        (cli.EXPERIMENT, "val_acc", "max"),
        (FRIEDMAN, "val_rmse", "min"),
    ):
        best = rehearsed(reference=reference).parts.best
        assert (best.monitor, best.mode) == (monitor, mode)


def test_no_checkpoint_is_selected_without_validation():
    assert rehearsed("--data.val_images", 0).parts.best is None
    assert rehearsed("--trainer.limit_val_batches", 0).parts.best is None
    assert rehearsed("--data.val_images", 10).parts.best is not None


@pytest.mark.parametrize(
    "dry", [("--trainer.fast_dev_run", "true"), ("--trainer.enable_checkpointing", "false")]
)
def test_checkpoints_can_be_disabled(dry):
    found = rehearsed(*dry).parts
    assert (found.best, found.resume) == (None, None)


def test_the_time_limit_is_applied_by_exact_resume():
    """After Lightning's own timer, a resumed run would skip the rest of the epoch."""
    built = rehearsed("--trainer.max_time", "00:01:00:00", "--seed_everything", 3)
    assert built.parts.arguments["max_time"] is None
    assert not any(type(c).__name__ == "Timer" for c in built.trainer.callbacks)
    resume = built.parts.resume
    assert resume.seed == 3
    assert resume.stop_requests._timer._duration == 3600


def test_monitors_are_added_unless_disabled_or_given():
    assert {NormMonitor, ClosingPictures} <= set(kinds(rehearsed()))
    assert not {NormMonitor, ClosingPictures} & set(kinds(rehearsed("--monitor", "false")))
    own = ("--trainer.callbacks+=bn_lightning.NormMonitor", "--trainer.callbacks.every_n_steps")
    built = rehearsed(*own, 3)
    assert NormMonitor not in kinds(built) and ClosingPictures in kinds(built)
    [monitor] = [c for c in built.trainer.callbacks if isinstance(c, NormMonitor)]
    assert monitor.every_n_steps == 3


def test_callbacks_of_the_caller_come_after_the_records():
    marker = LearningRateMonitor("epoch")
    built = run.command_line(
        ["fit", "--trainer.accelerator", "cpu"], cli.EXPERIMENT, run.Rehearsal, [marker]
    )
    assert kinds(built)[0] is Records
    assert built.parts.callbacks[1] is marker


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_progress_bar_is_shown_at_a_terminal(monkeypatch, is_terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal, raising=False)
    built = rehearsed()
    assert (MetricsProgressBar in kinds(built)) == is_terminal
    assert built.parts.arguments["enable_progress_bar"] == is_terminal
    chosen = rehearsed("--trainer.enable_progress_bar", str(not is_terminal).lower())
    assert (MetricsProgressBar in kinds(chosen)) != is_terminal


def test_the_users_progress_bar_replaces_the_default():
    own = ("--trainer.callbacks+=lightning.pytorch.callbacks.TQDMProgressBar",)
    built = rehearsed(*own, "--trainer.enable_progress_bar", "true")
    assert MetricsProgressBar not in kinds(built)
    assert any(type(c) is TQDMProgressBar for c in built.trainer.callbacks)


def test_the_users_progress_bar_is_shown_in_a_file_too():
    built = rehearsed("--trainer.callbacks+=TQDMProgressBar")
    assert not sys.stdout.isatty()
    assert type(built.trainer.progress_bar_callback) is TQDMProgressBar


def test_an_object_of_the_user_replaces_the_default_of_its_class(tmp_path):
    (tmp_path / "own_monitors.py").write_text(
        "from bn_lightning import NormMonitor\n\n\nclass Own(NormMonitor):\n    pass\n"
    )
    own = ("own_monitors.Own", "LearningRateMonitor")
    sys.path.append(str(tmp_path))
    try:
        built = rehearsed(*(f"--trainer.callbacks+={name}" for name in own))
    finally:
        sys.path.remove(str(tmp_path))
    assert not {NormMonitor, LearningRateMonitor} & set(kinds(built))
    names = [type(callback).__name__ for callback in built.trainer.callbacks]
    assert names.count("Own") == names.count("LearningRateMonitor") == 1
    for plugin in ("AsyncCheckpointIO", "TorchCheckpointIO", "bn_lightning.WholeCheckpointIO"):
        built = rehearsed(f"--trainer.plugins+={plugin}")
        kind = type(built.trainer.strategy.checkpoint_io).__name__
        assert kind == plugin.rpartition(".")[2]
    plugins = ("--trainer.sync_batchnorm", "true", "--trainer.plugins+=bn_lightning.LayerSync")
    assert len(rehearsed(*plugins).parts.arguments["plugins"]) == 2


def test_a_model_checkpoint_of_the_user_has_its_own_state_and_files(main, tmp_path):
    few = ("--trainer.limit_train_batches", 2)
    own = ("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor", "val_acc")
    more = ("--trainer.callbacks.mode", "max", "--trainer.callbacks.save_top_k", 3)
    last = ("--trainer.callbacks.save_last", "true")
    code, _, err = main("fit", *BRIEF, *few, *own, *more, *last)
    assert code == 0, err
    folder = tmp_path / "runs/lenet/0/checkpoints"
    names = ["best.ckpt", "epoch=0-step=2.ckpt", "epoch=1-step=4.ckpt", "last-v1.ckpt", "last.ckpt"]
    assert sorted(path.name for path in folder.iterdir()) == names


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["bn_lightning.ExactResume"], "ExactResume is a part of every run"),
        (["ModelCheckpoint", "--trainer.callbacks.filename", "best"], "would write best.ckpt"),
        (
            [
                *("ModelCheckpoint", "--trainer.callbacks.save_last", "true"),
                *("--trainer.callbacks.enable_version_counter", "false"),
            ],
            "would write last.ckpt",
        ),
    ],
)
def test_a_callback_that_writes_the_files_of_the_run_is_refused(flags, message):
    name, *values = flags
    with pytest.raises(UserError, match=message):
        rehearsed(f"--trainer.callbacks+={name}", *values)


def test_early_stopping_waits_for_a_validation(main):
    """By default it would fail, since `max_steps` ends the run before the first validation."""
    own = ("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val_loss")
    code, _, err = main("fit", *BRIEF, "--trainer.max_steps", 2, *own)
    assert code == 0, err


def test_norms_are_synchronized_by_a_plugin_if_set():
    plugins = rehearsed().parts.arguments["plugins"]
    assert [type(plugin) for plugin in plugins] == [WholeCheckpointIO]
    plugins = rehearsed("--trainer.sync_batchnorm", "true").parts.arguments["plugins"]
    assert [type(plugin) for plugin in plugins] == [WholeCheckpointIO, LayerSync]


def test_the_tensorboard_logger_is_added_later(tmp_path):
    found = rehearsed().parts
    assert list(tmp_path.iterdir()) == []
    assert found.wants_tensorboard and found.arguments["logger"] is False
    assert not rehearsed("--trainer.logger", "false").parts.wants_tensorboard
    assert not rehearsed("--trainer.fast_dev_run", "true").parts.wants_tensorboard
    own = rehearsed("--trainer.logger", "lightning.pytorch.loggers.CSVLogger",
                    "--trainer.logger.save_dir", "logs")  # fmt: skip
    assert not own.parts.wants_tensorboard
    assert [type(logger).__name__ for logger in own.trainer.loggers] == ["CSVLogger"]


def test_a_test_needs_neither_checkpoints_nor_monitors(trained):
    best = trained[0] / "checkpoints/best.ckpt"
    built = rehearsed("--ckpt_path", best, command="test")
    assert not {NormMonitor, ClosingPictures} & set(kinds(built))
    assert (built.parts.best, built.parts.resume) == (None, None)


@pytest.mark.parametrize(
    ("devices", "expected"),
    [("auto", {"num_nodes": 3, "devices": 2}), (2, {"num_nodes": 3})],
)
def test_the_number_of_processes_comes_from_torchrun(monkeypatch, devices, expected):
    settings = Namespace(devices=devices)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert trainer._processes_of_torchrun(settings) == {}
    for name, value in (
        ("TORCHELASTIC_RUN_ID", "x"),
        ("LOCAL_WORLD_SIZE", "2"),
        ("WORLD_SIZE", "6"),
    ):
        monkeypatch.setenv(name, value)
    assert trainer._processes_of_torchrun(settings) == expected


@pytest.mark.parametrize(
    "flags",
    [
        ["--trainer.fast_dev_run", "true"],
        ["--trainer.logger", "false"],
        ["--trainer.enable_checkpointing", "false"],
        ["--trainer.limit_val_batches", "0"],
        ["--trainer.overfit_batches", "2"],
        ["--trainer.max_epochs", "-1", "--trainer.max_steps", "3"],
        ["--trainer.check_val_every_n_epoch", "2"],
        ["--trainer.val_check_interval", "3"],
        ["--trainer.accumulate_grad_batches", "4"],
        ["--trainer.profiler", "simple"],
        ["--trainer.precision", "64-true"],
        ["--trainer.enable_progress_bar", "true"],
    ],
    ids=lambda flags: " ".join(flags),
)
def test_results_are_complete_with_trainer_flags(main, tmp_path, flags):
    code, out, err = main("fit", *BRIEF, *flags)
    assert code == 0, err
    assert "gamma of the first norm layer" in out
    folder = tmp_path / "runs" / "lenet" / "0"
    found = result_of(folder)
    assert 0 <= found["test_acc"] <= 1
    assert found["images_per_second"] > 0
    if "fast_dev_run" in flags[0] or "enable_checkpointing" in flags[0]:
        assert found["tested"] == "the weights in memory"
        assert not (folder / "checkpoints").exists()
