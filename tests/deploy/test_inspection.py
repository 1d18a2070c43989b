"""The command `inspect`: tables and JSON, without executing code of the file."""

import json
import pickle
import shutil

import pytest
import torch

from bn_lightning import Classifier, UserError
from bn_lightning.deploy import inspection
from bn_lightning.experiment import EXPERIMENT
from tests.projects.friedman.experiment import EXPERIMENT as FRIEDMAN_EXPERIMENT
from tests.support.exports import FRIEDMAN, write_regression


def test_json_describes_the_checkpoint(main, trained):
    folder, _ = trained
    path = folder / "checkpoints/last.ckpt"
    code, out, err = main("inspect", path, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    state = torch.load(path, weights_only=True)["state_dict"]
    model = Classifier()
    assert found["parameters"] == sum(p.numel() for p in model.network.parameters()) == 44_878
    assert found["layers"]["conv2"] == {"parameters": 2_416, "weight": [16, 6, 5, 5], "bias": [16]}
    assert sum(layer["parameters"] for layer in found["layers"].values()) == 44_878
    assert list(found["norms"]) == ["norm1", "norm2", "norm3", "norm4"]
    torch_names = {"gamma": "weight", "beta": "bias", "running_mean": "running_mean"}
    for name, torch_name in torch_names.items():
        assert found["norms"]["norm3"][name] == state[f"network.norm3.{torch_name}"].tolist()
    result = json.loads((folder / "result.json").read_text())
    assert (found["step"], found["epochs"][-1]["train_loss"]) == (44, result["train_loss"])
    assert found["validations"][-1]["val_acc"] == result["val_acc_final"]
    assert (found["settings"]["model.lr"], found["settings"]["data.source"]) == (1.0, "sample")
    assert (
        found["data"]["sha256"]["train-images-idx3-ubyte"]
        == result["sha256_train-images-idx3-ubyte"]
    )
    versions = {
        name: found["versions"][name] for name in ("lightning", "torch", "device", "processes")
    }
    torch_version = result["torch"].split("+")[0]
    assert versions == {
        "lightning": result["lightning"],
        "torch": torch_version,
        "device": "cpu",
        "processes": 1,
    }


def test_a_state_dict_without_settings_is_described(main, tmp_path):
    torch.save({"state_dict": Classifier().state_dict()}, tmp_path / "weights.ckpt")
    code, out, err = main("inspect", "weights.ckpt")
    assert (code, err) == (0, "")
    assert "44,878 parameters, training step unknown" in out
    torch.save({"state_dict": {"a.b": 3}}, tmp_path / "odd.ckpt")
    code, _, err = main("inspect", "odd.ckpt")
    assert code == 2 and "'odd.ckpt' does not contain a network: 'a.b' in its 'state_dict'" in err
    assert "has the type int" in err


def test_a_corrupt_result_json_is_an_error(main, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    (tmp_path / "run/result.json").write_text("{")
    code, _, err = main("inspect", "--run", "run")
    assert code == 2 and "'run/result.json' is corrupt" in err


def test_tables_show_tensors_settings_and_results(main, trained):
    folder, _ = trained
    code, out, err = main("inspect", "--run", folder)
    assert (code, err) == (0, "")
    state = torch.load(folder / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
    gamma = ", ".join(f"{value:.2f}" for value in state["network.norm1.weight"])
    assert f"norm1  gamma         [{gamma}]" in out
    result = json.loads((folder / "result.json").read_text())
    for line in (
        "44,878 parameters",
        "conv1        156  weight [6, 1, 5, 5], bias [6]",
        "--model.norm     ",
        "data source sample",
        f"test_acc           {result['test_acc']}",
    ):
        assert " ".join(line.split()) in " ".join(out.split())


@pytest.mark.parametrize("norm", ["article", "renorm", "none"])
def test_tensors_of_all_norms_have_the_same_names(tmp_path, norm):
    model = Classifier(norm=norm)
    torch.save({"state_dict": model.state_dict(), "global_step": 3}, tmp_path / "a.ckpt")
    found = inspection.describe(str(tmp_path / "a.ckpt"), EXPERIMENT)
    assert found["parameters"] == sum(p.numel() for p in model.network.parameters())
    names = {"gamma", "beta", "running_mean", "running_var"}
    assert all(set(tensors) == names for tensors in found["norms"].values())
    assert len(found["norms"]) == (0 if norm == "none" else 4)


class Bomb:
    def __reduce__(self):
        return open, ("exploded", "w")


def test_nothing_is_executed(main, trained, tmp_path):
    (tmp_path / "trap.py").write_text("open('sprung', 'w')\n")
    content = torch.load(trained[0] / "checkpoints/best.ckpt", weights_only=True)
    content["hyper_parameters"]["norm"] = "trap.Norm"
    torch.save(content, tmp_path / "trap.ckpt")
    code, out, _ = main("inspect", "trap.ckpt")
    assert code == 0 and "trap.Norm" in out
    (tmp_path / "bomb.ckpt").write_bytes(pickle.dumps({"state_dict": Bomb()}, protocol=2))
    code, _, err = main("inspect", "bomb.ckpt")
    assert code == 2 and "Nothing in it was executed" in err
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "exploded").exists()


def test_metrics_of_another_task_are_shown(tmp_path, capsys):
    ckpt = write_regression(tmp_path / "some.ckpt")
    content = torch.load(ckpt, weights_only=True)
    validations = [
        {"step": step, "val_loss": rmse**2, "val_rmse": rmse, "val_r2": 0.5}
        for step, rmse in ((4, 3.0), (8, 1.5), (12, 2.0))
    ]
    epochs = [{"train_loss": 6.25, "train_rmse": 2.5, "train_r2": 0.25}]
    content["callbacks"] = {"Records": {"epochs": epochs, "validations": validations}}
    torch.save(content, ckpt)
    inspection.main(["inspect", str(ckpt)], FRIEDMAN)
    out = capsys.readouterr().out
    assert "last finished epoch (1): train loss 6.250, rmse 2.500, r2 0.250\n" in out
    assert "last validation (step 12): loss 4.000, rmse 2.000, r2 0.500\n" in out
    assert "best validation (step 8): rmse 1.500\n" in out
    shown = " ".join(out.split())
    assert "data source formula" in shown and "--data.rows 100" in shown
    assert "--seed_everything 3" in shown and "of another machine" not in shown
    found = inspection.describe(str(ckpt), FRIEDMAN_EXPERIMENT)
    assert (found["validations"], found["data"]) == (validations, {"source": "formula"})
    with pytest.raises(UserError, match="--run runs/friedman/0"):
        inspection.main(["inspect", "--run", str(tmp_path)], FRIEDMAN)


def test_missing_checkpoints_are_errors(main, tmp_path):
    code, _, err = main("inspect", "missing.ckpt")
    assert code == 2 and "There is no checkpoint 'missing.ckpt'" in err
    code, _, err = main("inspect", "--run", tmp_path)
    assert code == 2 and "There is no checkpoint in" in err
    assert main("inspect")[0] == 2
