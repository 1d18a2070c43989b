"""The number of steps for which a schedule is planned is that of the run."""

import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from bn_lightning import UserError
from tests.training.test_optimization import fit


@pytest.mark.parametrize(
    ("accumulation", "trainer", "steps"),
    [
        ({0: 4, 1: 3}, {"max_epochs": 2}, 5),
        ({1: 3}, {"max_epochs": 3}, 14),
        ({0: 4, 1: 2}, {"max_epochs": 2, "max_steps": 4}, 4),
        ({0: 4, 1: 2}, {"max_epochs": -1, "max_steps": 7}, 7),
        ({0: 3}, {"max_epochs": 2, "limit_train_batches": 0.5}, 4),
        (None, {"max_epochs": 2, "accumulate_grad_batches": 3}, 6),
        (None, {"max_epochs": 2, "limit_train_batches": 5, "accumulate_grad_batches": 2}, 6),
        (None, {"max_epochs": 2, "val_check_interval": 3}, 16),
    ],
)
def test_a_schedule_has_as_many_steps_as_the_run(accumulation, trainer, steps):
    if accumulation is not None:
        trainer = trainer | {"callbacks": [GradientAccumulationScheduler(accumulation)]}
    used = fit({"scheduler": "CosineAnnealingLR"}, **trainer)
    [config] = used.lr_scheduler_configs
    assert config.scheduler.T_max == used.global_step == steps
    assert used.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_a_one_cycle_that_ends_before_the_run_is_refused():
    short = {"scheduler": "OneCycleLR", "scheduler_args": {"total_steps": 5}}
    with pytest.raises(UserError, match="OneCycleLR is set to 5 steps, but the run has 8"):
        fit(short)
    assert fit(short, max_steps=5).global_step == 5
