"""A NaN or infinite loss ends the run before its weights are saved."""

import json

import lightning.pytorch as pl
import pytest
import torch

from bn_lightning import FashionMNIST
from bn_lightning.errors import RunFailed
from bn_lightning.training.losses import FAILURE, NonFiniteLossGuard
from tests.conftest import BRIEF
from tests.projects.friedman.experiment import Regression, Table


class Bad(pl.Callback):
    """A callback that sets weights to infinity at step 5."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 5:
            pl_module.network.fc3.weight.data.fill_(float("inf"))


def test_a_nan_loss_ends_the_run_before_its_weights_are_saved(main, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "bad.py").write_text(f"from {__name__} import Bad as Bad\n")
    settings = ("--checkpoint.every_n_train_steps", 5, "--trainer.callbacks+=bad.Bad")
    code, _, err = main("fit", *BRIEF, *settings)
    assert code == 1
    assert "The loss is nan at step 7 (epoch 2, batch 3)." in err
    assert "The last good checkpoint is from step 5" in err
    assert "Traceback" not in err
    failure = json.loads((tmp_path / "runs/lenet/0/failure.json").read_text())
    data = FashionMNIST("sample")
    data.prepare_data()
    data.setup("fit")
    assert failure["samples"] == data.train_order(1)[2 * 32 : 3 * 32].tolist()
    assert (failure["step"], failure["epoch"], failure["batch"]) == (7, 1, 2)
    state = torch.load(tmp_path / "runs/lenet/0/checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 5
    assert all(torch.isfinite(value).all() for value in state["state_dict"].values())


@pytest.fixture
def trainer():
    """A trainer after one epoch on 100 rows."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", enable_checkpointing=False, max_epochs=1, **quiet)
    trainer.fit(Regression(width=4), Table(rows=100, batch_size=25))
    return trainer


def outputs(*losses):
    return [torch.tensor(loss) for loss in losses]


@pytest.mark.parametrize("losses", [(), (1.0,), (1.0, 0.0, 1e30)])
def test_finite_losses_are_accepted(trainer, tmp_path, losses):
    guard = NonFiniteLossGuard()
    for batch_idx, loss in enumerate(outputs(*losses)):
        guard.add(trainer, loss, batch_idx)
    guard.check(trainer, tmp_path / "checkpoints/last.ckpt", saved_at=-1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_message_names_the_first_non_finite_loss_and_its_samples(trainer, tmp_path, bad):
    guard = NonFiniteLossGuard()
    for batch_idx, loss in enumerate(outputs(1.0, 2.0, bad, float("nan"))):
        guard.add(trainer, loss, batch_idx)
    path = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(RunFailed) as failed:
        guard.check(trainer, path, saved_at=-1)
    message = str(failed.value)
    assert f"The loss is {bad} at step 4 (epoch 2, batch 3)." in message
    assert "last good checkpoint" not in message
    found = json.loads((tmp_path / FAILURE).read_text())
    assert found["samples"] == trainer.datamodule.train_order(1)[50:75].tolist()
    assert ", ".join(map(str, found["samples"][:8])) in message


def test_a_step_may_return_a_dict_or_nothing(trainer, tmp_path):
    guard = NonFiniteLossGuard()
    guard.add(trainer, None, 0)
    guard.check(trainer, tmp_path / "a/b", saved_at=-1)
    guard.add(trainer, {"loss": torch.tensor(float("nan"))}, 1)
    with pytest.raises(RunFailed, match=r"last good checkpoint is from step 3: (?s:.*)--resume"):
        guard.check(trainer, tmp_path / "run/checkpoints/last.ckpt", saved_at=3)
    assert list(tmp_path.iterdir()) == []  # the run has no folder


def test_each_loss_is_checked_once(trainer, tmp_path):
    guard = NonFiniteLossGuard()
    guard.add(trainer, torch.tensor(float("nan")), 0)
    with pytest.raises(RunFailed):
        guard.check(trainer, tmp_path / "a/b", saved_at=-1)
    guard.check(trainer, tmp_path / "a/b", saved_at=-1)


def test_with_another_loader_the_message_names_the_step_only(trainer, tmp_path):
    trainer.fit_loop._combined_loader = None
    guard = NonFiniteLossGuard()
    guard.add(trainer, torch.tensor(float("nan")), 0)
    with pytest.raises(RunFailed) as failed:
        guard.check(trainer, tmp_path / "checkpoints/last.ckpt", saved_at=-1)
    assert "samples" not in str(failed.value)
    assert json.loads((tmp_path / FAILURE).read_text()) == {"step": 4, "epoch": 1, "batch": 0}
