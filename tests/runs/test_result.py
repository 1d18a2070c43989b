"""result.json: assembling, writing and reading."""

import json

import pytest
import torch

from bn_lightning import Task, UserError
from bn_lightning.runs import result
from bn_lightning.runs.records import Records
from tests.conftest import BRIEF
from tests.projects.friedman.experiment import Regression
from tests.support.runs import result_of


def test_result_is_one_flat_object(trained):
    found = result_of(trained[0])
    first = [
        *("train_loss", "train_acc", "val_loss", "val_acc", "test_loss", "test_acc"),
        *("images_per_second", "epochs", "steps", "seed", "network", "norm", "data_source"),
        *("device", "precision", "processes"),
    ]
    assert list(found)[: len(first)] == first
    assert all(isinstance(value, str | int | float) for value in found.values())
    assert (found["epochs"], found["steps"], found["seed"]) == (2, 44, 0)
    assert (found["norm"], found["data_source"], found["device"]) == ("custom", "sample", "cpu")
    assert (found["precision"], found["processes"], found["tested"]) == ("32-true", 1, "best.ckpt")
    assert found["torch"] == torch.__version__
    assert (found["finished"], found["resumed_at_steps"]) == (True, "")
    assert len(found["sha256_train-images-idx3-ubyte"]) == 64
    assert 0.5 < found["test_acc"] < 1
    # Two epochs of 5,500 images.
    assert abs(found["images_per_second"] * found["train_seconds"] - 11_000) < 1


def test_the_precision_that_was_actually_used_is_recorded(main, tmp_path):
    settings = ("--trainer.precision", "16-mixed", "--trainer.max_epochs", 1)
    with pytest.warns(UserWarning, match="AMP with fp16 is not supported on CPU"):
        assert main("fit", *BRIEF, *settings)[0] == 0
    assert result_of(tmp_path / "runs" / "lenet" / "0")["precision"] == "bf16-mixed"


def test_metrics_after_a_resume_are_those_of_the_tested_weights(main, trained, tmp_path):
    last = trained[0] / "checkpoints" / "last.ckpt"
    # With this learning rate the weights get worse.
    flags = ("--trainer.max_epochs", 3, "--trainer.limit_train_batches", 2, "--model.lr", "100")
    assert main("fit", "--ckpt_path", last, *flags)[0] == 0
    folder = tmp_path / "runs" / "lenet" / "0"
    _, out, _ = main("validate", "--ckpt_path", folder / "checkpoints" / "best.ckpt")
    assert f"val_acc    {result_of(folder)['val_acc']:.4f}" in out
    assert main("fit", "--ckpt_path", last, "--trainer.max_epochs", 2)[0] == 0  # no step is left
    assert result_of(tmp_path / "runs" / "lenet" / "1")["tested"].endswith("best.ckpt")


class ByAccuracy(Task):
    """A task with a metric that is maximized."""

    selects = ("val_acc", "max")

    def __init__(self):
        super().__init__(torch.nn.Linear(1, 1))


def records_of(name, values, best_since=0):
    records = Records()
    records.validations = [
        {"step": step, "val_loss": 10.0 * step, name: value} for step, value in enumerate(values, 1)
    ]
    records.best_since = best_since
    return records


@pytest.mark.parametrize(
    ("task", "best_since", "step"),
    [(ByAccuracy, 0, 1), (ByAccuracy, 1, 2), (Regression, 0, 3), (Regression, 3, 4)],
)
def test_the_best_validation_depends_on_the_metric_of_the_task(task, best_since, step):
    name, _ = task.selects
    records = records_of(name, [4.0, 3.0, 1.0, 2.0], best_since)
    assert result.best_validation(task(), records)["step"] == step
    selected = result._selected(task(), records)
    assert selected[f"{name}_final"] == 2.0
    assert selected[f"{name}_best"] == {1: 4.0, 2: 3.0, 3: 1.0, 4: 2.0}[step]
    assert selected[f"{name}_mean_of_last_3"] == 2.0


def test_validation_metrics_are_those_of_the_tested_weights():
    task, records = Regression(), records_of("val_rmse", [4.0, 1.0, 2.0])
    records.epochs = [{"train_loss": 9.0}, {"train_loss": 8.0, "train_rmse": 7.0}]
    for tested, rmse in (("best.ckpt", 1.0), ("last.ckpt", 2.0), ("the weights in memory", 2.0)):
        found = result._metrics(task, records, tested)
        assert found["val_rmse"] == rmse
        assert (found["train_loss"], found["train_rmse"], found["train_r2"]) == (8.0, 7.0, None)
        assert [found[name] for name in task.names("test")] == [None] * 3


def test_there_is_no_best_validation_without_any():
    found = result._selected(Regression(), Records())
    assert list(found.values()) == [None] * 3
    assert result.best_validation(Regression(), Records()) == {}


def test_json_is_written_atomically(tmp_path):
    path = tmp_path / "result.json"
    result.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        result.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_nan_and_infinity_are_null_in_json():
    inf, nan = float("inf"), float("nan")
    content = {"a": nan, "b": [1.5, inf, {"c": -inf}], "d": (nan, "nan"), "e": True}
    expected = {"a": None, "b": [1.5, None, {"c": None}], "d": [None, "nan"], "e": True}
    assert json.loads(result.to_json(content)) == expected


def test_result_json_is_read_and_a_corrupt_file_is_refused(tmp_path):
    assert result.read_result(tmp_path) == {}
    result.write_json(tmp_path / "result.json", {"a": 1.5})
    assert result.read_result(tmp_path) == {"a": 1.5}
    for content in ("{half", "3", "[1]"):
        (tmp_path / "result.json").write_text(content)
        with pytest.raises(UserError, match=r"result\.json' is corrupt"):
            result.read_result(tmp_path)
