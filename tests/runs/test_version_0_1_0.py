"""Runs of version 0.1.0 work with this version. The run was stopped at step 30 of 44."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import weights

OLD = Path(__file__).parent / "of_version_0.1.0"
BEST = "runs/lenet/0/checkpoints/best.ckpt"


@pytest.fixture
def old(main, tmp_path):
    """Return a function that runs a command in a folder with the old run."""
    shutil.copytree(OLD, tmp_path / "runs" / "lenet" / "0")
    return main


def test_an_old_run_is_tested(old):
    code, out, err = old("test", "--ckpt_path", BEST)
    assert code == 0, err
    result = json.loads((OLD / "result.json").read_text())
    metrics = dict(line.split() for line in out.splitlines()[:2])
    assert float(metrics["test_acc"]) == pytest.approx(result["test_acc"], abs=1e-3)
    assert float(metrics["test_loss"]) == pytest.approx(result["test_loss"], abs=1e-3)


def test_an_old_run_is_resumed_at_its_last_step(old, tmp_path):
    code, out, err = old("fit", "--resume", "runs/lenet/0", "--trainer.max_steps", -1)
    assert code == 0, err
    assert "Resuming from step 30 (runs/lenet/0/checkpoints/last.ckpt)" in out
    result = json.loads((tmp_path / "runs/lenet/0/result.json").read_text())
    assert (result["steps"], result["resumed_at_steps"]) == (44, "30")
    # Metrics of the epoch with the stop are those of an uninterrupted run. Version 0.1.0 gave
    # 1.074 and 0.616.
    assert result["train_loss"] == pytest.approx(1.074, abs=2e-3)
    assert result["train_acc"] == pytest.approx(0.616, abs=2e-3)
    last = torch.load(tmp_path / "runs/lenet/0/checkpoints/last.ckpt", weights_only=True)
    assert last["data"]["source"] == "sample"


def test_an_old_run_is_not_resumed_with_other_data(old, tmp_path):
    path = tmp_path / "runs/lenet/0/checkpoints/last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["FashionMNIST"]["sha256"]["train-images-idx3-ubyte"] = "0" * 64
    torch.save(checkpoint, path)
    code, _, err = old("fit", "--resume", "runs/lenet/0", "--trainer.max_steps", -1)
    assert code == 2
    assert "was trained on other data (source sample)" in err


def test_an_old_run_is_exported(old):
    code, out, err = old("export", BEST, "x.pt2", "--source", "sample")
    assert code == 0, err
    assert "norm1 is folded into conv1" in out


def test_an_old_run_is_inspected(old):
    code, out, err = old("inspect", "--run", "runs/lenet/0", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["data"]["source"] == "sample"
    assert found["settings"]["model.norm"] == "custom"
    assert [v["step"] for v in found["validations"]] == [22]
    norm1 = weights(OLD / "checkpoints" / "best.ckpt")["network.norm1.weight"]
    assert found["norms"]["norm1"]["gamma"] == pytest.approx(norm1.tolist())
