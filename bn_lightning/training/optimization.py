"""Optimizer and learning-rate schedule, built from names and checked before a run.

A new setting is first an argument of `Task`, which makes it a flag, and then one of `Optimization`.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bn_lightning import lookup
from bn_lightning.errors import UserError

# Arguments of schedules that state the length of the run in optimizer steps.
LENGTHS = ("total_steps", "T_max")


class Optimization:
    """An optimizer and a schedule as a user names them.

    Args: see `Task`.

    Raises:
        UserError: an unknown name, or something that is not a class.
    """

    def __init__(
        self,
        lr: float,
        optimizer: str,
        optimizer_args: Mapping[str, Any] | None,
        scheduler: str | None,
        scheduler_args: Mapping[str, Any] | None,
    ) -> None:
        schedulers = torch.optim.lr_scheduler
        self.lr = lr
        self.optimizer = _find(optimizer, "optimizer", lookup.classes_in(torch.optim, Optimizer))
        self.optimizer_args = dict(optimizer_args or {})
        self.scheduler: Any = None
        if scheduler is not None:
            known = lookup.classes_in(schedulers, LRScheduler)
            self.scheduler = _find(scheduler, "scheduler", known)
        self.scheduler_args = dict(scheduler_args or {})

    def check(self, parameters: Iterable[nn.Parameter]) -> None:
        """Build both once, so that a wrong argument shows before anything is started.

        Raises:
            UserError: an argument that the optimizer or the scheduler does not take.
        """
        arguments = {"lr": self.lr, **self.optimizer_args}
        optimizer = _build(self.optimizer, arguments, parameters)
        if self.scheduler is not None:
            _build(self.scheduler, self._scheduler_arguments(steps=1_000), optimizer)

    def configure(
        self, parameters: Iterable[nn.Parameter], steps_of_run: Callable[[], float]
    ) -> Any:
        """Return what `configure_optimizers` of a LightningModule returns.

        Args:
            steps_of_run: the number of optimizer steps; called only if the schedule needs it.

        Raises:
            UserError: the schedule needs to know the length of the run, which has none.
        """
        optimizer = self.optimizer(parameters, lr=self.lr, **self.optimizer_args)
        if self.scheduler is None:
            return optimizer
        lengths = self._lengths()
        steps = steps_of_run() if lengths else 0
        if steps == float("inf"):
            raise UserError(
                f"{self.scheduler.__name__} needs to know how long the run is: give "
                "--trainer.max_epochs or --trainer.max_steps, or its own length: "
                f"--model.scheduler_args.{lengths[0]}"
            )
        scheduler = self.scheduler(optimizer, **self._scheduler_arguments(int(steps)))
        # A schedule that counts steps moves at every step. It was told their number here, or it
        # has no other unit (OneCycleLR, CyclicLR).
        interval = "step" if lengths or self._takes("max_lr") else "epoch"
        config = {"scheduler": scheduler, "interval": interval}
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            config["monitor"] = "val_loss"
        return {"optimizer": optimizer, "lr_scheduler": config}

    def refuse_another_length(self, trainer: pl.Trainer) -> None:
        """Refuse to resume a schedule that was planned for a run of another length.

        Raises:
            UserError: the steps that are done would have had other learning rates.
        """
        if self.scheduler is None:
            return
        for name in self._lengths():
            steps = trainer.estimated_stepping_batches
            for config in trainer.lr_scheduler_configs:
                planned = getattr(config.scheduler, name, steps)
                if planned != steps:
                    raise UserError(
                        f"{self.scheduler.__name__} was planned for {planned:,} steps when the run "
                        f"began, and would now have {steps:,}: the learning rates of the steps "
                        "that are done would have been others.\n"
                        "Resume with the same --trainer.max_epochs or --trainer.max_steps, or start"
                        " a new run."
                    )

    def _lengths(self) -> list[str]:
        """Return the scheduler's arguments that state the length, where the user has not."""
        given = self.scheduler_args.keys()
        return [name for name in LENGTHS if self._takes(name) and not given & {name, "epochs"}]

    def _takes(self, name: str) -> bool:
        return name in inspect.signature(self.scheduler).parameters

    def _scheduler_arguments(self, steps: int) -> dict[str, Any]:
        arguments: dict[str, Any] = dict.fromkeys(self._lengths(), steps)
        if self._takes("max_lr"):
            arguments["max_lr"] = self.lr
        return arguments | self.scheduler_args


def _find(name: str, kind: str, known: Mapping[str, type]) -> Any:
    found = lookup.find(name, kind, known)
    if not inspect.isclass(found):
        raise UserError(f"The {kind} {name!r} is not a class.")
    return found


def _build(kind: Any, arguments: Mapping[str, Any], first: Any) -> Any:
    try:
        return kind(first, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{kind.__name__} cannot be built with {dict(arguments)}: {error}.\n"
            f"Its signature is {kind.__name__}{inspect.signature(kind)}"
        ) from error
