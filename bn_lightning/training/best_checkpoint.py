"""The callback that writes `best.ckpt`, beside any ModelCheckpoint of the user."""

from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint


class BestCheckpoint(ModelCheckpoint):
    """Writes `best.ckpt` after the best validation.

    Lightning keeps the states of callbacks by class, monitor and interval. The class of its
    own keeps this state apart from that of a user's ModelCheckpoint.
    """

    def __init__(self, monitor: str, mode: Literal["min", "max"]) -> None:
        super().__init__(
            filename="best",
            monitor=monitor,
            mode=mode,
            save_last=False,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Version 0.1.0 wrote best.ckpt with a ModelCheckpoint.
        states, key = checkpoint["callbacks"], self.state_key
        before = key.replace(BestCheckpoint.__qualname__, ModelCheckpoint.__qualname__, 1)
        if key not in states and before in states:
            states[key] = states.pop(before)
