"""What may change the rounding of a run besides its settings."""

from importlib.metadata import version
from types import SimpleNamespace

import torch

from bn_lightning.training import surroundings
from tests.conftest import QUICK


def trainer(world_size=1, rank=0):
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    return SimpleNamespace(world_size=world_size, strategy=strategy, is_global_zero=rank == 0)


def test_they_are_plain_data():
    found = surroundings.of(trainer(world_size=3))
    assert found == {
        "torch": version("torch"),
        "lightning": version("lightning"),
        "device": "cpu",
        "processes": 3,
        "threads": 3 * torch.get_num_threads(),
    }


def test_what_differs_is_printed_once(capsys):
    now = surroundings.of(trainer())
    surroundings.report_differences(trainer(), dict(now))
    assert capsys.readouterr().out == ""
    before = now | {"torch": "2.0.1", "processes": 2}
    surroundings.report_differences(trainer(rank=1), before)
    assert capsys.readouterr().out == ""
    surroundings.report_differences(trainer(), before)
    assert capsys.readouterr().out == (
        f"resuming with torch {now['torch']}, before 2.0.1; processes 1, before 2: "
        "the same run up to rounding, not to the bit\n"
    )
    del before["device"]  # a checkpoint of a version that did not keep it
    surroundings.report_differences(trainer(), before)
    assert "device cpu, before None" in capsys.readouterr().out


def test_a_resumed_run_says_it(main, tmp_path):
    settings = ("--trainer.limit_train_batches", 2, "--trainer.max_epochs", 1)
    assert main("fit", *QUICK, *settings)[0] == 0
    last = tmp_path / "runs/lenet/0/checkpoints/last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["between_steps"]["surroundings"]["torch"] = "2.0.1"
    torch.save(checkpoint, last)
    _, out, _ = main("fit", "--resume", "runs/lenet/0", "--trainer.max_epochs", 2)
    assert f"resuming with torch {version('torch')}, before 2.0.1: the same run up to" in out
