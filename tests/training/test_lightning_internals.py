"""Lightning's loop state: reading it, and changing it in checkpoints."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment

from bn_lightning.training import lightning_internals
from tests.projects.friedman.experiment import Regression, Table


class Watch(pl.Callback):
    """Records the position of the run at the start and at the end of each batch."""

    def __init__(self):
        self.epochs, self.starts, self.ends = [], [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.epochs.append((trainer.current_epoch, lightning_internals.first_batch(trainer)))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        position = (trainer.current_epoch, batch_idx, trainer.global_step)
        # batches_done already includes the batch that is about to start.
        self.starts.append((*position, lightning_internals.batches_done(trainer)))

    def on_train_batch_end(self, trainer, *rest):
        self.ends.append(lightning_internals.is_last_batch(trainer))


def train(ckpt_path=None, **limits):
    watch = Watch()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        accelerator="cpu", enable_checkpointing=False, callbacks=[watch], **quiet, **limits
    )
    data = Table(rows=100, batch_size=25)
    trainer.fit(Regression(width=4), data, ckpt_path=ckpt_path, weights_only=True)
    return trainer, watch


def test_the_position_of_a_run_in_its_epochs():
    _, watch = train(max_epochs=2)
    assert watch.epochs == [(0, 0), (1, 0)]
    steps = [(epoch, batch, 4 * epoch + batch, batch + 1) for epoch in (0, 1) for batch in range(4)]
    assert watch.starts == steps
    assert watch.ends == 2 * [False, False, False, True]


@pytest.mark.parametrize(("epoch", "batch", "steps"), [(1, 2, 6), (1, 0, 4), (0, 3, 3)])
def test_a_changed_checkpoint_resumes_at_the_start_of_the_given_batch(
    tmp_path, epoch, batch, steps
):
    trainer, _ = train(max_steps=steps)
    path = tmp_path / "x.ckpt"
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    assert lightning_internals.batches_that_stepped(checkpoint) == steps
    lightning_internals.write_position(checkpoint, epoch, batch)
    torch.save(checkpoint, path)
    trainer, watch = train(max_epochs=3, ckpt_path=path)
    assert watch.epochs[0] == (epoch, batch)
    assert watch.starts[0] == (epoch, batch, steps, batch + 1)
    assert len(watch.starts) == 12 - steps
    assert trainer.global_step == 12


def test_the_cluster_environment_and_the_disabled_broadcast():
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    found = lightning_internals.cluster_environment(trainer)
    assert found is None or isinstance(found, LightningEnvironment)
    lightning_internals.disable_sigterm_broadcast(trainer)
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor()
