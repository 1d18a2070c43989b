"""The callback that writes best.ckpt."""

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from bn_lightning.training.best_checkpoint import BestCheckpoint


@pytest.mark.parametrize("kind", [ModelCheckpoint, BestCheckpoint])
def test_its_state_is_found_in_old_and_new_checkpoints(kind):
    best = BestCheckpoint("val_acc", "max")
    before = best.state_key.replace("BestCheckpoint", kind.__name__)
    assert before.startswith(kind.__name__)
    checkpoint = {"callbacks": {before: {"best_model_path": "best.ckpt"}, "Records": {}}}
    best.on_load_checkpoint(None, None, checkpoint)
    assert checkpoint["callbacks"][best.state_key] == {"best_model_path": "best.ckpt"}
    assert len(checkpoint["callbacks"]) == 2
