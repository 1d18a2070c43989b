"""State of a task that a checkpoint does not contain."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric

from bn_lightning.testing.own_generators import GENERATORS, kind_of
from bn_lightning.training.task import Task


def outside(task: Task) -> list[str]:
    """Return descriptions of the state of a task that is not in its state dict.

    This is a list of candidates: tensors, modules and generators that are attributes or
    in Python containers.
    """
    lines = []
    for name, value in _attributes(task):
        for inner in _values(value):
            if isinstance(inner, Tensor):
                lines.append(f"{name} is or contains a plain tensor: use register_buffer()")
            elif isinstance(inner, nn.Module):
                kind = type(inner).__name__
                lines.append(f"{name} has a {kind} in a Python container: use nn.ModuleList")
            elif isinstance(inner, GENERATORS):
                kind = kind_of(inner)
                lines.append(f"{name} is a generator of its own ({kind}): use the global ones")
            else:
                continue
            break
    return lines


def changed_attributes(one: Task, other: Task) -> list[str]:
    """Return the numbers that are attributes of two tasks and differ, in words."""
    others = dict(_attributes(other))
    return [
        f"{name} is {value} in the trained object and {others[name]} in the restored one"
        for name, value in _attributes(one)
        if isinstance(value, int | float) and others.get(name, value) != value
    ]


def _attributes(task: Task) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of a task and its modules that are not registered in PyTorch."""
    for prefix, module in task.named_modules():
        is_metric = isinstance(module, Metric)
        is_of_torch = type(module).__module__.startswith("torch.nn")
        if is_metric or is_of_torch:
            continue
        for name, value in vars(module).items():
            # Private attributes of the task are those of Lightning and of this project.
            if name.startswith("_") and (module is task or name in vars(nn.Module())):
                continue
            if name in ("training", "step_samples", "confusion"):
                continue
            yield f"{prefix}.{name}".removeprefix("."), value


def _values(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else [value]
