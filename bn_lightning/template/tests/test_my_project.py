"""Test the task, the network, the norm, the data and a short run. Add your own tests here."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bn_lightning.testing import DataTests, TaskTests, norm_checks
from torch.nn import functional as F

from my_project import data, norms
from my_project.experiment import EXPERIMENT

DEBUG = Path(__file__).parent.parent / "configs" / "debug.yaml"


def run(*arguments):
    """Run a command of this project in the current folder, and return what it prints."""
    program = [sys.executable, "-m", "my_project"]
    done = subprocess.run([*program, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class TestTask(TaskTests):
    experiment = "my_project.experiment:EXPERIMENT"


def test_the_network_returns_a_logit_per_class_for_any_image_size():
    defaults = {name.partition(".")[::2]: value for name, value in EXPERIMENT.defaults.items()}
    settings = {name: value for (group, name), value in defaults.items() if group == "model"}
    model = EXPERIMENT.task(**settings, in_channels=3, image_size=(64, 48), num_classes=7)
    assert model(torch.randn(4, 3, 64, 48)).shape == (4, 7)


@norm_checks(norms.RMSNorm)
def test_the_norm_has_the_properties_of_norms(check):
    check()


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 3, 4)])
def test_the_norm_equals_that_of_torch(shape):
    norm = norms.RMSNorm(shape[1], len(shape), eps=0.1)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(shape)
    expected = F.rms_norm(x.movedim(1, -1), (shape[1],), norm.weight.flatten(), eps=0.1)
    torch.testing.assert_close(norm(x), expected.movedim(-1, 1))


class TestData(DataTests):
    experiment = "my_project.experiment:EXPERIMENT"


def test_a_short_run_learns_and_its_checkpoint_predicts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("fit", "--config", DEBUG)
    result = json.loads(Path("runs/debug/0/result.json").read_text())
    # A network that guesses has the loss log(number of classes).
    *_, classes = data.load()
    assert result["train_loss"] < math.log(len(classes))
    checkpoint = "runs/debug/0/checkpoints/best.ckpt"
    answers = run("predict", "--ckpt_path", checkpoint, "--format", "csv")
    assert any(name in answers for name in classes)
