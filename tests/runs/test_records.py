"""Recorded metrics and times, and the line that is printed per epoch."""

import json
import re

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from bn_lightning.runs.records import Records, recorded_in
from tests.conftest import BRIEF
from tests.projects.friedman.experiment import Regression, Table

LINE = re.compile(
    r"epoch +(\d+)(/\d+)?  train loss [\d.]+  train rmse [\d.]+  train r2 -?[\d.]+"
    r"(  val loss [\d.]+  val rmse [\d.]+  val r2 -?[\d.]+)?  [\d,]+ samples/s"
)


def fit(data=None, ckpt_path=None, callbacks=(), **settings):
    """Train on 200 rows in batches of 30, and return the records and the trainer."""
    torch.manual_seed(0)
    records = Records()
    trainer = pl.Trainer(
        accelerator="cpu",
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        callbacks=[records, *callbacks],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    data = data or Table(rows=200, batch_size=30)
    model = Regression(lr=0.01)
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return records, trainer


class Bad(pl.Callback):
    """Sets running statistics to NaN. Only evaluation uses them."""

    def on_validation_start(self, trainer, pl_module):
        pl_module.network.norm1.running_mean.fill_(float("nan"))


def test_a_nan_validation_loss_is_a_warning(main, tmp_path, monkeypatch):
    """The training loss stays finite."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "bad.py").write_text(f"from {__name__} import Bad as Bad\n")
    code, _, err = main("fit", *BRIEF, "--trainer.callbacks+=bad.Bad")
    assert code == 0
    message = "WARNING: the validation loss is nan after step 4. Try a smaller --model.lr."
    assert message in err
    assert json.loads((tmp_path / "runs/lenet/0/result.json").read_text())["val_loss"] is None


def test_each_epoch_and_each_validation_is_recorded_and_printed(capsys):
    records, trainer = fit(max_epochs=2, val_check_interval=3)
    assert records.images == 400 and records.seconds > 0
    assert [list(metrics) for metrics in records.epochs] == 2 * [
        ["train_loss", "train_rmse", "train_r2"]
    ]
    # An epoch has 7 batches. It is validated after the third and the sixth.
    assert [metrics["step"] for metrics in records.validations] == [3, 6, 10, 13]
    assert list(records.validations[0]) == ["step", "val_loss", "val_rmse", "val_r2"]
    last = records.validations[-1]
    assert last["val_rmse"] == float(trainer.callback_metrics["val_rmse"])
    assert last["val_rmse"] == pytest.approx(last["val_loss"] ** 0.5, rel=1e-5)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert all(LINE.fullmatch(line) for line in lines), lines
    assert [line.split()[1] for line in lines] == ["1/2", "2/2"]
    assert f"train loss {records.epochs[0]['train_loss']:.3f}" in lines[0]
    assert f"val rmse {records.validations[1]['val_rmse']:.3f}" in lines[0]


def test_the_line_of_an_epoch_without_validation_has_no_validation_metrics(capsys):
    records, _ = fit(max_epochs=-1, max_steps=21, check_val_every_n_epoch=2)
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("epoch")]
    assert [LINE.fullmatch(line)[3] is not None for line in lines] == [False, True, False]
    assert lines[0].startswith("epoch  1  ")  # the number of epochs is unknown
    assert [metrics["step"] for metrics in records.validations] == [14]


def test_metrics_of_the_test_set_are_labelled_test(capsys):
    class Short(Table):
        validates_on_test_set = True

    fit(Short(rows=200, batch_size=30), max_epochs=1)
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("epoch"))
    assert "test rmse" in line and "val " not in line


def test_a_resumed_run_continues_its_records(tmp_path):
    before, trainer = fit(max_epochs=1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = recorded_in(torch.load(tmp_path / "x.ckpt", weights_only=True))
    assert saved["epochs"] == before.epochs and saved["images"] == 200
    after, _ = fit(max_epochs=3, ckpt_path=tmp_path / "x.ckpt")
    assert after.images == 600 and after.seconds > before.seconds
    assert after.epochs[:1] == before.epochs and len(after.epochs) == 3
    assert after.validations[:1] == before.validations and len(after.validations) == 3
    # No checkpoint was selected before, so earlier validations are not candidates.
    assert (before.best_since, after.best_since) == (0, 7)
    assert recorded_in({"state_dict": {}}) == {}


# `main` hides this warning; see `process.set_up`.
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_validations_before_a_selected_checkpoint_are_candidates(tmp_path):
    def best():
        return ModelCheckpoint(tmp_path, monitor="val_rmse")

    _, trainer = fit(max_epochs=1, callbacks=[best()])
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    after, _ = fit(max_epochs=2, ckpt_path=tmp_path / "x.ckpt", callbacks=[best()])
    assert after.best_since == 0


def test_validation_is_not_part_of_the_training_time(monkeypatch):
    class Clock(pl.Callback):
        """A step takes an eighth of a second, and a validation batch 100 seconds."""

        now = 0.0

        def perf_counter(self):
            return self.now

        def on_train_batch_start(self, *args):
            self.now += 0.125

        def on_validation_batch_end(self, *args):
            self.now += 100

    clock = Clock()
    monkeypatch.setattr("bn_lightning.runs.records.time", clock)
    data = Table(rows=60, batch_size=10)  # 6 training and 3 validation batches
    records, _ = fit(data, max_epochs=1, num_sanity_val_steps=1, callbacks=[clock])
    assert records.seconds == 6 * 0.125
    assert len(records.validations) == 1  # the sanity check is not recorded
