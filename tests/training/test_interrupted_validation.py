"""An exception during a validation with precise statistics."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from bn_lightning import Classifier, FashionMNIST, PreciseStatistics
from tests.support.logs import QUIET


class Fails(pl.Callback):
    """Ends the first validation with an exception, and keeps the statistics of training."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.before = {name: b.clone() for name, b in pl_module.named_buffers()}

    def on_validation_batch_end(self, trainer, *args):
        if trainer.state.fn == "fit":
            raise RuntimeError("the validation fails")


def interrupted(*callbacks):
    """Return trainer and network of a fit whose first validation fails, and the data."""
    data, model = FashionMNIST("sample", batch_size=16), Classifier(lr=0.1)
    limits = {"max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 1}
    trainer = pl.Trainer(
        **limits, num_sanity_val_steps=0, logger=False, callbacks=[*callbacks], **QUIET
    )
    with pytest.raises(RuntimeError, match="the validation fails"):
        trainer.fit(model, data)
    return trainer, model, data


def test_the_network_has_its_running_statistics_back():
    failing, precise = Fails(), PreciseStatistics(2)
    _, model, _ = interrupted(precise, failing)
    assert failing.before.keys() >= precise.estimated.keys() != set()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, failing.before[name]), name


@pytest.mark.parametrize("averaging", [(), (EMAWeightAveraging(decay=0.5),)], ids=["plain", "ema"])
def test_a_later_validation_leaves_another_network_unchanged(averaging):
    trainer, _, data = interrupted(*averaging, PreciseStatistics(2), Fails())
    other = Classifier(lr=0.1)
    before = {name: buffer.clone() for name, buffer in other.named_buffers()}
    trainer.validate(other, data, verbose=False)
    for name, buffer in other.named_buffers():
        assert torch.equal(buffer, before[name]), name
