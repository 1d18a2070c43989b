"""An experiment: the task, the data and the defaults of a project."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bn_lightning import lookup
from bn_lightning.errors import UserError
from bn_lightning.training.data_module import DataModule
from bn_lightning.training.task import Task


@dataclass(frozen=True)
class Experiment:
    """The task, the data and the defaults of a project.

    `python -m bn_lightning new` writes a project. Two of its files are needed:
    `shoe_shop/experiment.py` contains

        EXPERIMENT = Experiment(ShoeTask, ShoeData, "shoes", {"trainer.max_epochs": 10})

    and `shoe_shop/__main__.py` calls
    `bn_lightning.cli.main("shoe_shop.experiment:EXPERIMENT")`.

    Attributes:
        task: class of the task. Its arguments are the flags `--model.KEY`.
        data: class of the data module. Its arguments are the flags `--data.KEY`.
        name: default of `--name`; runs are stored in `runs/NAME/N`.
        defaults: defaults of other flags by name, for example `{"trainer.max_epochs":
            10}`. The precedence of settings is defaults < checkpoint < --config <
            flags.
    """

    task: type[Task]
    data: type[DataModule]
    name: str
    defaults: Mapping[str, Any] = field(default_factory=dict)


def load(reference: str) -> Experiment:
    """Import an experiment from its import path, `package.module:NAME`.

    Raises:
        UserError: the object cannot be imported, or is not an Experiment.
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
