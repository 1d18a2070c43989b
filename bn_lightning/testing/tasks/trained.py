"""The trained task of a test. If it cannot be used as a test needs it, the test fails."""

from typing import Any

import pytest
from torch import Tensor

from bn_lightning.deploy import served
from bn_lightning.testing import batches
from bn_lightning.testing.failures import describe, fail, listed
from bn_lightning.testing.tasks import fitting, state
from bn_lightning.testing.tasks.fitting import Fitted
from bn_lightning.testing.tasks.runs import Runs
from bn_lightning.training.task import Stage, Task

# Samples of an evaluation, and the smallest number with unequal batches.
MOST_SAMPLES, LEAST_SAMPLES = 200, 6


def fitted_of(runs: Runs) -> Fitted:
    """Return the task that was trained on one batch; let the test fail if there is none."""
    if isinstance(runs.fitted, Exception):
        fail(
            f"Training on one batch fails: {describe(runs.fitted)}",
            "the code that raises this error.",
        )
    return runs.fitted


def restore(fitted: Fitted) -> served.Restored:
    """Return a new task from the checkpoint; let the test fail if this is impossible."""
    try:
        return fitted.restore()
    except Exception as error:
        fail(
            f"The checkpoint of the task cannot be loaded in a new object: {error}",
            "arguments of the task that are objects, arguments that it does not save, and "
            "state_dict() or load_state_dict() that rename weights.",
        )


def candidates(task: Task, restored: Task | None = None) -> str:
    """Return the state of a task outside of its state dict, for a message."""
    found = state.changed_attributes(task, restored) if restored is not None else []
    found += state.outside(task)
    return f" Found:\n{listed(found)}" if found else ""


def evaluation_batch(fitted: Fitted, stage: Stage) -> Any:
    """Return a batch of validation or test samples."""
    data = fitted.data
    data.setup("fit" if stage == "val" else "test")
    loader = data.val_dataloader() if stage == "val" else data.test_dataloader()
    batch = next(iter(loader))
    size = batches.count(batch)
    if size < LEAST_SAMPLES:
        pytest.skip(f"A batch has {size} samples, and {LEAST_SAMPLES} are needed for four batches.")
    return batches.part(batch, 0, min(size, MOST_SAMPLES))


def evaluate(fitted: Fitted, stage: Stage, parts: list[Any]) -> dict[str, float]:
    """Return all that is logged when the task is evaluated; let the test fail if it cannot be."""
    sizes = ", ".join(str(batches.count(part)) for part in parts)
    try:
        return fitted.evaluate(stage, parts)
    except Exception as error:
        fail(
            f"The evaluation of batches of {sizes} samples fails: {describe(error)}",
            "reshapes with a fixed batch size, and squeeze(), which removes the dimension of the "
            "batch if it has one sample.",
        )


def outputs(fitted: Fitted, batch: Any) -> Tensor:
    """Return the outputs of the task in eval mode; let the test fail if it raises an error."""
    size = batches.count(batch)
    try:
        return fitting.outputs_of(fitted.task, batch)
    except Exception as error:
        fail(
            f"The network fails for a batch of {size} sample(s): {describe(error)}",
            "reshapes with a fixed batch size, and squeeze(), which removes the dimension of the "
            "batch if it has one sample.",
        )
