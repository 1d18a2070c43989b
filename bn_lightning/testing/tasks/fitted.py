"""A task that was trained on one batch. If it cannot be used, the running test fails."""

import copy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from bn_lightning.deploy import served
from bn_lightning.runs import run
from bn_lightning.testing import batches
from bn_lightning.testing.failures import describe, fail
from bn_lightning.testing.tasks.watch import Watch
from bn_lightning.training.data_module import DataModule
from bn_lightning.training.task import Stage, Task

# Samples of an evaluation, and the smallest number with unequal batches.
MOST_SAMPLES, LEAST_SAMPLES = 200, 6
FIXED_SIZE = (
    "reshapes with a fixed batch size, and squeeze(), which removes the dimension of the batch if "
    "it has one sample."
)


@dataclass
class Fitted:
    """A task that was trained on one batch.

    Attributes:
        cli: the command line, which has the trainer.
        batch: the batch.
        watch: what was observed.
        new_metrics: copies of the metrics, made before training.
        checkpoint: the checkpoint of the trained task.
        outputs: the outputs of the trained task for the batch, in eval mode.
        is_exact: whether the training loader can be resumed and shared exactly.
        generators: random generators that the Dataset of training keeps, in words.
        tried: the settings that were tried, in words.
    """

    cli: run.CLI
    batch: Any
    watch: Watch
    new_metrics: dict[str, Metric]
    checkpoint: Path
    outputs: Tensor
    is_exact: bool
    generators: list[str]
    tried: list[str] = field(default_factory=list)

    @property
    def task(self) -> Task:
        return self.cli.model

    @property
    def data(self) -> DataModule:
        return self.cli.datamodule

    @cached_property
    def trusted(self) -> dict[str, str]:
        """Import paths in the settings of the tests, which `restore` would refuse."""
        names = served.import_flags(self.cli.experiment)
        chosen = {name: self.cli.config.fit.get(name) for name in names}
        return {name: value for name, value in chosen.items() if isinstance(value, str)}

    def restore(self) -> served.Restored:
        """Return a new task with the weights of the checkpoint."""
        try:
            return served.restore(str(self.checkpoint), self.cli.reference, self.trusted)
        except Exception as error:
            fail(
                f"The checkpoint of the task cannot be loaded in a new object: {error}",
                "arguments of the task that are objects, arguments that it does not save, and "
                "state_dict() or load_state_dict() that rename weights.",
            )

    def evaluation_batch(self, stage: Stage) -> Any:
        """Return a batch of validation or test samples."""
        self.data.setup("fit" if stage == "val" else "test")
        batch = next(iter(getattr(self.data, f"{stage}_dataloader")()))
        size = batches.count(batch)
        if size < LEAST_SAMPLES:
            pytest.skip(f"A batch has {size} samples, and the test needs {LEAST_SAMPLES}.")
        return batches.part(batch, 0, min(size, MOST_SAMPLES))

    def evaluate(self, stage: Stage, parts: list[Any]) -> dict[str, float]:
        """Return all that is logged when the task is evaluated on some batches."""
        trainer, loader = self.cli.trainer, f"{stage}_dataloader"
        command = trainer.validate if stage == "val" else trainer.test
        # An attribute of the object hides the method of its class.
        vars(self.data)[loader] = lambda: batches.FixedBatches(parts)
        try:
            command(self.task, datamodule=self.data, verbose=False)
        except Exception as error:
            sizes = ", ".join(str(batches.count(part)) for part in parts)
            what = f"The evaluation of batches of {sizes} samples fails"
            fail(f"{what}: {describe(error)}", FIXED_SIZE)
        finally:
            del vars(self.data)[loader]
            self.task.trainer = None
        return {name: float(value) for name, value in trainer.callback_metrics.items()}

    def outputs_for(self, batch: Any) -> Tensor:
        """Return the outputs of the trained task for a batch, in eval mode."""
        try:
            return outputs_of(self.task, batch)
        except Exception as error:
            what = f"The network fails for a batch of {batches.count(batch)} sample(s)"
            fail(f"{what}: {describe(error)}", FIXED_SIZE)


@torch.no_grad()
def outputs_of(task: Task, batch: Any) -> Tensor:
    """Return the outputs of a task for a batch, in eval mode."""
    task.eval()
    step = task.step(copy.deepcopy(batch), "val")
    return step.outputs.detach().clone()
