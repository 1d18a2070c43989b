"""Single steps of a task: their outputs, metrics and random numbers."""

import copy
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from bn_lightning.testing.tasks.fitted import Fitted
from bn_lightning.training import seeds
from bn_lightning.training.task import Stage, Step, Task


def step(task: Task, batch: Any, stage: Stage, seed: int = 0) -> Step:
    """Return the step of a task for a copy of a batch, in the mode of the stage."""
    seeds.seed_read(seed)
    task.train(stage == "train")
    return task.step(copy.deepcopy(batch), stage)


def training_step(task: Task, batch: Any, stage: Stage) -> Step:
    """Return a step, after its gradients were computed."""
    task.zero_grad()
    found = step(task, batch, stage)
    found.loss.backward()  # type: ignore[no-untyped-call]
    return found


@torch.no_grad()
def is_random(task: Task, batch: Any) -> bool:
    """Return whether the loss in training depends on random numbers, as with dropout."""
    before = copy.deepcopy(task.state_dict())
    losses = [float(step(task, batch, "train", seed).loss) for seed in (1, 2)]
    task.load_state_dict(before)
    return losses[0] != losses[1]


@torch.no_grad()
def metrics_at_once(fitted: Fitted, stage: Stage, batch: Any) -> dict[str, float]:
    """Return the loss and the metrics of one batch, computed by metrics that are new."""
    task = fitted.task
    found = step(task, batch, stage)
    values = {f"{stage}_loss": float(found.loss)}
    for name in task.names(stage)[1:]:
        metric = copy.deepcopy(fitted.new_metrics[name])
        metric.update(found.outputs, found.targets)
        value = metric.compute()
        values[name] = float(value)
    return values


def round_to_bfloat16(values: Any) -> Any:
    """Return a nested structure with its floating-point tensors rounded to bfloat16."""
    return apply_to_collection(
        values, Tensor, lambda it: it.bfloat16().to(it.dtype) if it.is_floating_point() else it
    )


def is_plain(value: Any) -> bool:
    """Return whether a setting is plain data, which a checkpoint may contain."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    # A subclass, such as numpy.float64, is not plain.
    return value is None or type(value) in (bool, int, float, str)
