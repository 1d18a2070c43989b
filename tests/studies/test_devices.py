"""Which GPU each worker process uses. The list of GPUs is faked."""

import dataclasses

import pytest
import torch

from bn_lightning.studies import devices, study
from bn_lightning.studies.workers import MachineFailure, Workers

EXPERIMENT = "bn_lightning.experiment:EXPERIMENT"
SAMPLE = ("--data.source", "sample", "--trainer.accelerator", "cpu")

RECORDING = """\
import os, pathlib

def norm(**_):
    pathlib.Path(f"gpu-{os.environ['CUDA_VISIBLE_DEVICES']}").touch()
    os._exit(3)
"""


@pytest.mark.parametrize(
    ("given", "count", "expected"),
    [
        (None, 0, []),
        (None, 2, ["0", "1"]),
        ("2, 3", 2, ["2", "3"]),
        ("GPU-8f, GPU-9a", 2, ["GPU-8f", "GPU-9a"]),
        ("-1", 0, []),
        ("", 0, []),
        # CUDA ignores what follows an invalid number.
        ("1,9,0", 1, ["1"]),
    ],
)
def test_visible_gpus(monkeypatch, given, count, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv(devices.VARIABLE, raising=False)
    if given is not None:
        monkeypatch.setenv(devices.VARIABLE, given)
    assert devices.visible() == expected


def test_each_worker_has_its_own_gpu_and_keeps_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "recording.py").write_text(RECORDING)
    with Workers(EXPERIMENT, 3, 3, ["5", "7"]) as pool:
        assert [worker.gpu for worker in pool._workers] == ["5", "7", "5"]
        for _ in range(2):
            with pytest.raises(MachineFailure):
                pool.fit([*SAMPLE, "--model.norm", "recording.norm"], tmp_path / "log", None)
        # Both workers have died in their runs and were replaced.
        assert [worker.gpu for worker in pool._workers] == ["5", "7", "5", "5", "7"]
    assert sorted(path.name for path in tmp_path.glob("gpu-*")) == ["gpu-5", "gpu-7"]


def test_a_device_that_the_user_names_is_kept(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(devices, "visible", lambda: ["0", "1"])
    plan = study.plan_runs(EXPERIMENT, (*study.DEFAULTS, *SAMPLE))
    assert plan.gpus() == ["0", "1"]
    assert dataclasses.replace(plan, names_device=True).gpus() == []
