"""Schedulers and callbacks that monitor a metric which the run does not have."""

import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from bn_lightning import UserError
from bn_lightning.training import monitors
from tests.runs.test_trainer import rehearsed
from tests.training.test_optimization import fit

PLATEAU = {"scheduler": "ReduceLROnPlateau"}


def plateau(**arguments):
    return PLATEAU | {"scheduler_args": arguments}


@pytest.mark.parametrize(
    ("trainer", "updates"),
    [
        ({"max_epochs": 2}, 2),
        ({"max_epochs": 5, "check_val_every_n_epoch": 2}, 2),
        ({"max_epochs": 2, "check_val_every_n_epoch": 9}, 0),
        # 8 batches per epoch: no validation in the first and the fourth.
        ({"max_epochs": 4, "check_val_every_n_epoch": None, "val_check_interval": 11}, 2),
        ({"max_epochs": 2, "val_check_interval": 3}, 2),
        ({"max_epochs": 2, "accumulate_grad_batches": 3}, 2),
        ({"max_epochs": 2, "max_steps": 5}, 0),
        ({"max_epochs": 2, "max_steps": 10}, 1),
    ],
)
@pytest.mark.filterwarnings("ignore:ReduceLROnPlateau conditioned on metric")
def test_reduce_on_plateau_is_updated_after_epochs_with_a_validation(trainer, updates):
    [config] = fit(PLATEAU, **trainer).lr_scheduler_configs
    assert config.scheduler.last_epoch == updates


def test_reduce_on_plateau_has_the_metric_of_the_user():
    named = {"scheduler": "lightning.pytorch.cli.ReduceLROnPlateau"}
    for settings in (plateau(monitor="val_rmse"), plateau(monitor="val_rmse") | named):
        [config] = fit(settings).lr_scheduler_configs
        assert (config.monitor, config.scheduler.last_epoch) == ("val_rmse", 1)
    [config] = fit(plateau(monitor="train_loss_epoch"), limit_val_batches=0).lr_scheduler_configs
    assert config.scheduler.last_epoch == 1


@pytest.mark.parametrize(
    ("settings", "callback", "trainer", "message"),
    [
        (PLATEAU, None, {"limit_val_batches": 0}, "ReduceLROnPlateau monitors val_loss, but this"),
        ({}, EarlyStopping("val_rmse"), {"limit_val_batches": 0}, "has no validation"),
        (plateau(monitor="val_rms"), None, {}, "monitors val_rms, but validation logs val_loss, "),
        ({}, EarlyStopping("val_x"), {}, "EarlyStopping monitors val_x, but validation logs"),
    ],
)
def test_a_monitor_without_its_metric_is_refused_before_the_first_step(
    settings, callback, trainer, message
):
    callbacks = [callback] if callback else []
    with pytest.raises(UserError, match=message):
        fit(settings, callbacks=callbacks, **trainer)


def test_nothing_follows_the_test_set():
    found = [("Own", "score"), ("EarlyStopping", "train_loss_epoch")]
    known = {"validates": True, "on_test_set": True}
    monitors.refuse_unusable(found, [], **known)
    with pytest.raises(UserError, match="Own monitors score, which is computed on the test set"):
        monitors.refuse_unusable(found, ["score"], **known)


@pytest.mark.parametrize(
    "flags",
    [
        ["--model.scheduler", "ReduceLROnPlateau"],
        ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val_loss"],
        ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor", "val_acc"],
    ],
)
def test_a_monitor_is_refused_before_the_run_has_a_folder(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for missing, message in (
        (["--data.val_images", 0], "is computed on the test set"),
        (["--trainer.limit_val_batches", 0], "has no validation"),
    ):
        with pytest.raises(UserError, match=message):
            rehearsed(*flags, *missing)
    rehearsed(*flags)
    assert not list(tmp_path.iterdir())


def test_callbacks_of_one_class_are_all_considered():
    callbacks = [EarlyStopping("val_loss"), EarlyStopping("train_loss"), ModelCheckpoint()]
    assert [metric for _, metric in monitors.of_callbacks(callbacks)] == ["val_loss", "train_loss"]
