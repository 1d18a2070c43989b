"""Conditions outside the settings that affect rounding."""

from importlib.metadata import version
from types import SimpleNamespace

import torch

from bn_lightning.training import surroundings
from tests.conftest import BRIEF


def trainer(world_size=1, rank=0):
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    return SimpleNamespace(world_size=world_size, strategy=strategy, is_global_zero=rank == 0)


def test_the_conditions_are_plain_data():
    found = surroundings.of(trainer(world_size=3))
    assert found == {
        "torch": version("torch"),
        "lightning": version("lightning"),
        "device": "cpu",
        "processes": 3,
        "threads": 3 * torch.get_num_threads(),
    }


def test_differences_are_printed_on_rank_0_only(capsys):
    now = surroundings.of(trainer())
    surroundings.report_differences(trainer(), dict(now))
    assert capsys.readouterr().out == ""
    before = now | {"torch": "2.0.1", "processes": 2}
    surroundings.report_differences(trainer(rank=1), before)
    assert capsys.readouterr().out == ""
    surroundings.report_differences(trainer(), before)
    assert capsys.readouterr().out == (
        f"Resuming with torch {now['torch']} (was 2.0.1), processes 1 (was 2). "
        "The resumed run is equal up to rounding, but not bit for bit.\n"
    )
    del before["device"]  # as in a checkpoint of an older version
    surroundings.report_differences(trainer(), before)
    assert "device cpu (was unknown)" in capsys.readouterr().out


def test_a_resumed_run_prints_the_differences(main, tmp_path):
    assert main("fit", *BRIEF, "--trainer.max_epochs", 1)[0] == 0
    last = tmp_path / "runs/lenet/0/checkpoints/last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["between_steps"]["surroundings"]["torch"] = "2.0.1"
    torch.save(checkpoint, last)
    _, out, _ = main("fit", "--resume", "runs/lenet/0", "--trainer.max_epochs", 2)
    assert (
        f"Resuming with torch {version('torch')} (was 2.0.1). The resumed run is equal up to" in out
    )
