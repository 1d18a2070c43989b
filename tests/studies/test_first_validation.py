"""Runs that end before their first validation are refused before they start."""

import re

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from bn_lightning import UserError
from bn_lightning.studies.first_validation import refuse_runs_without_validation
from tests.projects.friedman.experiment import Regression, Table
from tests.support.logs import QUIET

LENGTHS = [
    ({"max_steps": 3}, False),
    ({"max_steps": 4}, True),
    ({"max_steps": 2, "accumulate_grad_batches": 3}, True),
    ({"max_steps": 1, "accumulate_grad_batches": 3}, False),
    ({"max_steps": 1, "val_check_interval": 2}, False),
    ({"max_steps": 2, "val_check_interval": 0.5}, True),
    ({"max_steps": 7, "check_val_every_n_epoch": 2}, False),
    ({"max_steps": 8, "check_val_every_n_epoch": 2}, True),
    ({"max_steps": 5, "check_val_every_n_epoch": None, "val_check_interval": 6}, False),
    ({"max_steps": 6, "check_val_every_n_epoch": None, "val_check_interval": 6}, True),
    ({"max_steps": 2, "limit_train_batches": 2}, True),
    ({"max_epochs": 1, "check_val_every_n_epoch": 2}, False),
    ({"max_epochs": 2, "check_val_every_n_epoch": 2}, True),
    ({"max_epochs": -1}, True),
]


@pytest.mark.parametrize(("settings", "validates"), LENGTHS)
def test_what_is_refused_is_what_is_not_validated(settings, validates):
    class Counting(Regression):
        validations = 0

        def on_validation_end(self):
            self.validations += 1

    # Four batches per epoch.
    def data():
        return Table(batch_size=250)

    data_module = data()
    data_module.prepare_data()
    quiet = QUIET | {"logger": False, "num_sanity_val_steps": 0} | settings
    trainer = pl.Trainer(**quiet)
    if validates:
        refuse_runs_without_validation(trainer, data_module)
    else:
        with pytest.raises(UserError, match=r"Use --trainer\.max_") as caught:
            refuse_runs_without_validation(trainer, data_module)
        # The advised number of steps is right.
        if steps := re.search(r"--trainer\.max_steps (\d+) or more", str(caught.value)):
            enough = pl.Trainer(**quiet | {"max_steps": int(steps[1])})
            refuse_runs_without_validation(enough, data_module)
    if trainer.max_epochs != -1 or trainer.max_steps >= 0:
        task = Counting()
        trainer.fit(task, data())
        assert (task.validations > 0) == validates


def test_a_schedule_of_accumulation_is_not_refused():
    schedule = GradientAccumulationScheduler({0: 4})
    trainer = pl.Trainer(max_steps=1, callbacks=[schedule], **QUIET)
    refuse_runs_without_validation(trainer, Table(batch_size=250))
