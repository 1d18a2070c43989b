"""The classes of optimizers and schedulers in a run and in a checkpoint."""

import pytest
import torch

from bn_lightning import ExactResume, UserError
from bn_lightning.training import optimizer_and_scheduler
from tests.training.test_resume import Line, fit_line

SGD = {"optimizer": ["SGD"], "scheduler": []}


def test_checkpoints_of_old_versions_have_the_names_in_their_settings():
    settings = {"optimizer": "torch.optim.SGD", "optimizer_args": None, "scheduler_args": None}
    for scheduler, expected in ((None, []), ("StepLR", ["StepLR"])):
        old = {"hyper_parameters": {**settings, "scheduler": scheduler}}
        assert optimizer_and_scheduler.in_checkpoint(old) == {**SGD, "scheduler": expected}
    assert optimizer_and_scheduler.in_checkpoint({"optimization": SGD}) == SGD
    # The settings of another LightningModule may have any meaning.
    for other in ({}, {"optimizer": "sgd"}, {"optimizer": 3, "optimizer_args": 1}):
        assert optimizer_and_scheduler.in_checkpoint({"hyper_parameters": other}) == {}


class Adaptive(Line):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Scheduled(Line):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Adaptive, "The optimizer was SGD when the run started and is now Adam."),
        (Scheduled, "The scheduler was none when the run started and is now ExponentialLR."),
    ],
)
def test_any_module_with_another_optimizer_or_scheduler_is_refused(tmp_path, module, message):
    fit_line(tmp_path, 1)
    last = tmp_path / "checkpoints/last.ckpt"
    with pytest.raises(UserError, match=message):
        fit_line(tmp_path, 2, last, module=module())
    resume = ExactResume()
    fit_line(tmp_path, 2, last, resume=resume)
    assert resume.resumed_at == [5]
