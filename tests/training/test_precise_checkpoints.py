"""Which statistics the checkpoints of a plain trainer have with PreciseStatistics."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from bn_lightning import PreciseStatistics, UserError
from tests.support.plain_training import Residual, fit, inputs_of, shuffled
from tests.support.precise import assert_statistics

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:The '.*_dataloader' does not have many workers",
    "ignore:The number of training batches",
)


def test_checkpoints_within_an_epoch_have_the_statistics_of_training(tmp_path):
    """Their weights are not those of the last validation."""
    every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)

    fit([every], shuffled, tmp_path)
    truth = {it.name: torch.load(it, weights_only=True) for it in tmp_path.glob("*.ckpt")}
    for path in tmp_path.glob("*.ckpt"):
        path.unlink()
    again = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
    fit([again, PreciseStatistics(3)], shuffled, tmp_path)
    assert sorted(truth) == ["step=10.ckpt", "step=15.ckpt", "step=20.ckpt", "step=5.ckpt"]
    for name, content in truth.items():
        state = torch.load(tmp_path / name, weights_only=True)["state_dict"]
        assert all(torch.equal(state[it], value) for it, value in content["state_dict"].items())


class AtStart(pl.Callback):
    """Saves at the start of each epoch, as LearningRateFinder does, to restore the state."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_epoch_start(self, trainer, pl_module):
        trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}.ckpt")


def test_checkpoints_at_the_start_of_an_epoch_have_the_statistics_of_training(tmp_path):
    fit([AtStart(tmp_path / "without")], shuffled, tmp_path)
    fit([AtStart(tmp_path / "with"), PreciseStatistics(3)], shuffled, tmp_path)
    for epoch in range(3):
        truth, found = (
            torch.load(tmp_path / name / f"{epoch}.ckpt", weights_only=True)["state_dict"]
            for name in ("without", "with")
        )
        assert all(torch.equal(found[name], value) for name, value in truth.items()), epoch


def test_a_checkpoint_of_weights_alone_has_the_statistics_at_the_end_of_a_validation(tmp_path):
    def only_weights(**settings):
        return ModelCheckpoint(tmp_path, "weights", save_weights_only=True, **settings)

    with pytest.raises(UserError, match="Add save_on_train_epoch_end=False"):
        fit([PreciseStatistics(3), only_weights()], shuffled, tmp_path)
    precise = PreciseStatistics(3)
    fit([precise, only_weights(save_on_train_epoch_end=False)], shuffled, tmp_path)
    state = torch.load(tmp_path / "weights.ckpt", weights_only=True)["state_dict"]
    reference = Residual()
    reference.load_state_dict(state)
    assert_statistics(state, reference, inputs_of(precise, shuffled))
