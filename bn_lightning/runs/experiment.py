"""An experiment: the task, the data and the defaults that a project consists of."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bn_lightning import lookup
from bn_lightning.errors import UserError
from bn_lightning.training.data_module import DataModule
from bn_lightning.training.task import Task


@dataclass(frozen=True)
class Experiment:
    """What binds a project's parts together; the machinery knows it from nowhere else.

    In a project of one's own, `shoe_shop/experiment.py` has

        EXPERIMENT = Experiment(ShoeTask, ShoeData, "shoes", {"trainer.max_epochs": 10})

    and `shoe_shop/__main__.py` runs `bn_lightning.cli.main("shoe_shop.experiment:EXPERIMENT")`.

    Attributes:
        task: what is learned; its arguments are the flags `--model.KEY`.
        data: what it is learned from; its arguments are the flags `--data.KEY`.
        name: the default of `--name`: runs are stored in `runs/NAME/N`.
        defaults: other defaults of flags, by their names: `{"trainer.max_epochs": 10}`.
            Precedence: defaults < checkpoint < --config < flags.
    """

    task: type[Task]
    data: type[DataModule]
    name: str
    defaults: Mapping[str, Any] = field(default_factory=dict)


def load(reference: str) -> Experiment:
    """Import an experiment by its reference, `package.module:NAME`.

    Raises:
        UserError: it cannot be imported, or is no Experiment.
    """
    module, _, name = reference.partition(":")
    found = lookup.find(f"{module}.{name}", "experiment", {})
    if not isinstance(found, Experiment):
        raise UserError(
            f"{reference!r} is a {type(found).__name__}; it must be a bn_lightning.Experiment."
        )
    for kind, part, base in (("task", found.task, Task), ("data", found.data, DataModule)):
        if not (isinstance(part, type) and issubclass(part, base)):
            raise UserError(
                f"The {kind} of {reference!r} is {part!r}; it must be a subclass of "
                f"bn_lightning.{base.__name__}."
            )
    return found


def package_of(reference: str) -> str:
    """Return the top-level package in which an experiment is defined."""
    return reference.partition(":")[0].partition(".")[0]
