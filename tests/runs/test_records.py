import json

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bn_lightning import LeNet
from bn_lightning.data.fashion_mnist import CLASSES
from bn_lightning.runs import records
from tests.conftest import QUICK


def test_a_run_leaves_these_files(trained):
    folder, _ = trained
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    events = [name for name in names if name.startswith("events.out.tfevents")]
    assert len(events) == 1
    assert sorted(set(names) - set(events)) == [".lock", "checkpoints/best.ckpt", "checkpoints/last.ckpt",
                                                "config.yaml", "result.json"]  # fmt: skip


def test_result_is_one_flat_object(trained):
    folder, _ = trained
    result = json.loads((folder / "result.json").read_text())
    first = ["train_loss", "train_acc", "val_loss", "val_acc", "test_loss", "test_acc", "images_per_second", "epochs",
             "steps", "seed", "norm", "data_source", "device", "precision", "processes"]  # fmt: skip
    assert list(result)[: len(first)] == first
    assert all(isinstance(value, str | int | float) for value in result.values())
    assert (result["epochs"], result["steps"], result["seed"]) == (2, 44, 0)
    assert (result["norm"], result["data_source"], result["device"]) == ("custom", "sample", "cpu")
    assert (result["precision"], result["processes"], result["tested"]) == ("32-true", 1, "best.ckpt")
    assert result["torch"] == torch.__version__
    assert (result["finished"], result["resumed_at_steps"]) == (True, "")
    assert len(result["sha256_train-images-idx3-ubyte"]) == 64
    assert 0.5 < result["test_acc"] < 1
    # Two epochs of 5,500 images in the time that was taken.
    assert abs(result["images_per_second"] * result["train_seconds"] - 11_000) < 1


def test_config_is_whole(trained):
    config = yaml.safe_load((trained[0] / "config.yaml").read_text())
    assert config["model"]["norm"] == "custom"
    assert config["data"]["source"] == "sample"
    assert config["seed_everything"] == 0


def test_tensorboard(trained):
    folder, _ = trained
    result = json.loads((folder / "result.json").read_text())
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()

    def curve(tag):
        return [(event.step, event.value) for event in events.Scalars(tag)]

    assert [step for step, _ in curve("train_loss")] == [9, 19, 29, 39]
    for tag in ("train_loss_epoch", "train_acc", "val_loss", "val_acc", "images_per_second"):
        assert [step for step, _ in curve(tag)] == [21, 43], tag
    assert curve("train_acc")[-1][1] == float(torch.tensor(result["train_acc"]))
    assert [value for _, value in curve("lr-SGD")] == [1.0] * 4
    assert len(curve("test_acc")) == 1
    assert {f"test_acc_of/{name}" for name in CLASSES} <= set(events.Tags()["scalars"])
    # The hyperparameters, and the figures that they led to.
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(events.summary_metadata)
    assert curve("result/test_acc")[0][1] == float(torch.tensor(result["test_acc"]))


def test_closing_lines(trained):
    folder, stdout = trained
    result = json.loads((folder / "result.json").read_text())
    assert stdout.count("epoch  ") == 2
    assert f"train loss {result['train_loss']:.3f}, train acc {result['train_acc']:.3f}" in stdout
    assert f"test acc {result['test_acc']:.3f}" in stdout
    assert f"{result['images_per_second']:,.1f} images/sec on cpu" in stdout
    state = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    gamma = ", ".join(f"{value:.2f}" for value in state["network.norm1.weight"])
    assert f"gamma of the first norm layer: [{gamma}]" in stdout


def test_closing_lines_of_other_norms():
    result = dict.fromkeys(
        ("train_loss", "train_acc", "test_acc", "images_per_second", "val_acc_best", "val_images_from", "device")
    )
    assert "first norm layer" not in records.closing_lines(result, LeNet("none").norm1)
    article = records.closing_lines(result, LeNet("article").norm1)
    assert "gamma of the first norm layer: [1.00, 1.00, 1.00, 1.00, 1.00, 1.00]" in article
    assert "beta of the first norm layer: [0.00, 0.00, 0.00, 0.00, 0.00, 0.00]" in article


def test_a_validation_that_has_lost_its_way_is_said(main, tmp_path):
    """With a norm the train loss stays finite where the weights overflow in evaluation."""
    code, _, err = main("fit", *QUICK, "--model.lr", "1e30")
    assert code == 0
    assert "WARNING: the validation loss is nan after step 22: a smaller --model.lr may help" in err
    assert json.loads((tmp_path / "runs/lenet/0/result.json").read_text())["val_loss"] is None


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result.json"
    records.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        records.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
