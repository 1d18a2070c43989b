"""The command `predict`, on the test set and on a user's own images."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from bn_lightning import Experiment, UserError
from bn_lightning.data import sources
from bn_lightning.data.fashion_mnist import CLASSES
from bn_lightning.deploy import predict
from tests.projects.friedman.experiment import Regression, Table
from tests.support.broken_pictures import broken_files
from tests.support.exports import FRIEDMAN, write_regression

TEST = sources.load("sample").test_images


def result(folder):
    return json.loads((folder / "result.json").read_text())


def test_all_formats_contain_the_same_predictions_of_the_test_set(trained, main):
    folder, _ = trained
    given = ("predict", "--ckpt_path", folder / "checkpoints" / "best.ckpt")
    code, out, _ = main(*given, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0
    assert len(rows) == 1_000
    labels = sources.load("sample").test_labels.tolist()
    assert [row["truth"] for row in rows] == [CLASSES[label] for label in labels]
    right = sum(row["class"] == row["truth"] for row in rows)
    assert right / 1_000 == pytest.approx(result(folder)["test_acc"])
    assert all(
        0.1 <= float(row["probability"]) >= float(row["runner_up_probability"]) for row in rows
    )
    assert all(row["class"] != row["runner_up"] in CLASSES for row in rows)
    code, out, _ = main(*given, "--format", "json")
    assert [{name: str(value) for name, value in row.items()} for row in json.loads(out)] == rows
    code, out, _ = main(*given)
    assert len(out.splitlines()) == 1_001
    titles = "image truth class uncalibrated p runner-up uncalibrated p"
    assert " ".join(out.splitlines()[0].split()) == titles


def test_the_number_of_batches_can_be_limited(main, trained):
    given = ("predict", "--ckpt_path", trained[0] / "checkpoints" / "best.ckpt", "--format", "csv")
    for flags, rows in (
        (("--trainer.limit_predict_batches", 1), 256),
        (("--trainer.fast_dev_run", "true"), 256),
    ):
        code, out, err = main(*given, *flags)
        assert (code, len(out.splitlines())) == (0, rows + 1), err
    code, _, err = main(*given, "--trainer.limit_predict_batches", 0)
    assert code == 2 and "There are no images to predict" in err


def test_predictions_are_drawn_on_a_sheet(main, trained, tmp_path):
    given = ("predict", "--ckpt_path", trained[0] / "checkpoints" / "best.ckpt", "--format", "csv")
    code, _, err = main(*given, "--grid", "grid.jpg")
    assert (code, err) == (0, "grid.jpg shows the first 400 of 1,000 images\n")
    assert (tmp_path / "grid.jpg").stat().st_size > 100_000
    for wrong, reason in (
        ("grid.nix", "format '.nix' for --grid: use, for example, --grid grid.png"),
        ("nowhere/grid.png", "There is no folder 'nowhere'"),
    ):
        code, out, err = main(*given, "--grid", wrong)
        assert (code, out) == (2, "")
        assert reason in err
    code, _, err = main(*given, "--format", "xml")
    assert code == 2
    assert "xml" in err and "csv" in err


def test_several_processes_are_refused(main, trained):
    code, out, err = main(
        "predict", "--ckpt_path", trained[0] / "checkpoints" / "best.ckpt", "--trainer.devices", 2
    )
    assert (code, out) == (2, "")
    assert "--trainer.devices 1" in err


def test_unreadable_files_are_listed_and_the_others_are_predicted(tmp_path, trained, main):
    folder = tmp_path / "images"
    folder.mkdir()
    names = broken_files(folder)
    assert len(names) == 20
    Image.fromarray(TEST[0].numpy()).save(folder / "good.png")
    given = [
        "--data.images",
        *(folder / name for name in [*names, "good.png", "missing.png"]),
        folder / "nothing-*",
    ]
    code, out, err = main(
        "predict", "--ckpt_path", trained[0] / "checkpoints/best.ckpt", *given, "--format", "csv"
    )
    assert code == 1
    for name in [*names, "missing.png"]:
        assert f"cannot read {folder / name}: " in err, name
    assert "Traceback" not in err
    assert "error: 21 of 22 images could not be read" in err
    header, row = out.strip().splitlines()
    assert header == "image,inverted,class,probability,runner_up,runner_up_probability"
    assert row.startswith(f"{folder / 'good.png'},no,")


def test_own_images_are_predicted_without_a_data_set(main, tmp_path, trained):
    Image.fromarray(TEST[0].numpy()).save(tmp_path / "a.png")
    code, out, err = main(
        "predict", "--ckpt_path", trained[0] / "checkpoints/best.ckpt", "--data.images", "a.png",
        "--data.source", tmp_path / "nowhere", "--format", "json", "--grid", "grid.png",
    )  # fmt: skip
    assert code == 0, err
    assert '"image": "a.png"' in out
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 84 and np.asarray(grid).std() > 20


def test_a_task_without_classes_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ckpt = write_regression(tmp_path / "some.ckpt", "SGD")
    arguments = ["predict", "--ckpt_path", str(ckpt), "--trainer.accelerator", "cpu"]
    message = "predict cannot be used: this task has no classes"
    with pytest.raises(UserError, match=message):
        predict.main(arguments, FRIEDMAN)


class HighOrLow(Table):
    """Data with classes and without images."""

    classes = ("low", "high")

    def setup(self, stage):
        super().setup(stage)
        self.targets = (self.targets > 14).long()


class Signs(Regression):
    def predict_step(self, batch, batch_idx):
        high = self(batch[0]).sigmoid()
        return torch.stack([1 - high, high], 1)


EXPERIMENT = Experiment(Signs, HighOrLow, "signs")


def test_a_data_set_without_images_has_predictions_but_no_sheet(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ckpt = write_regression(tmp_path / "some.ckpt", "SGD")
    arguments = ["predict", "--ckpt_path", str(ckpt), "--trainer.accelerator", "cpu"]
    reference = f"{__name__}:EXPERIMENT"
    predict.main([*arguments, "--format", "json"], reference)
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 100 and {row["truth"] for row in rows} == {"low", "high"}
    with pytest.raises(UserError, match="--grid cannot be used: this data set has no images"):
        predict.main([*arguments, "--grid", "grid.png"], reference)
    assert capsys.readouterr().out == "" and not (tmp_path / "grid.png").exists()
    with pytest.raises(UserError, match=r"HighOrLow cannot read files. Remove --data.images"):
        predict.main([*arguments, "--data.images", "some.ckpt"], reference)
