"""Optimizer and learning-rate scheduler, created from their names and validated before a run.

To add a setting, add an argument to `Task`, which makes it a flag, and pass it to
`Optimization`.
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

# Scheduler arguments that state the length of the run in optimizer steps.
LENGTHS = ("total_steps", "T_max")


class Optimization:
    """The optimizer and the scheduler that the settings name. For the arguments, see `Task`.

    Raises:
        UserError: a name is unknown, or does not refer to a class.
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
        """Create both once, so that wrong arguments are reported before a run starts.

        Raises:
            UserError: the optimizer or the scheduler does not accept an argument.
        """
        arguments = {"lr": self.lr, **self.optimizer_args}
        optimizer = _build(self.optimizer, arguments, parameters)
        if self.scheduler is not None:
            _build(self.scheduler, self._scheduler_arguments(steps=1_000), optimizer)

    def configure(
        self, parameters: Iterable[nn.Parameter], get_num_steps: Callable[[], float]
    ) -> Any:
        """Return the result of a LightningModule's `configure_optimizers`.

        Args:
            get_num_steps: returns the number of optimizer steps; called only if needed.

        Raises:
            UserError: the scheduler needs the length of the run, but the run has no
                limit.
        """
        optimizer = self.optimizer(parameters, lr=self.lr, **self.optimizer_args)
        if self.scheduler is None:
            return optimizer
        lengths = self._lengths()
        steps = get_num_steps() if lengths else 0
        if steps == float("inf"):
            raise UserError(
                f"{self.scheduler.__name__} needs the number of training steps, but the run "
                "has no limit.\nSet --trainer.max_epochs, --trainer.max_steps or "
                f"--model.scheduler_args.{lengths[0]}."
            )
        # Lightning returns -1 if only the number of epochs is limited.
        if steps < 0:
            raise UserError(
                f"{self.scheduler.__name__} needs the number of training steps, but the training "
                "loader has no length.\nSet --trainer.max_steps or "
                f"--model.scheduler_args.{lengths[0]}."
            )
        scheduler = self.scheduler(optimizer, **self._scheduler_arguments(int(steps)))
        # A scheduler counts steps if it was given their number, or has `max_lr`
        # (OneCycleLR, CyclicLR). Others count epochs.
        interval = "step" if lengths or self._accepts("max_lr") else "epoch"
        config = {"scheduler": scheduler, "interval": interval}
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            config["monitor"] = "val_loss"
        return {"optimizer": optimizer, "lr_scheduler": config}

    def refuse_other_length(self, trainer: pl.Trainer) -> None:
        """Refuse to resume with a schedule of another length.

        Raises:
            UserError: the steps done so far had other learning rates than the new
                schedule has.
        """
        if self.scheduler is None:
            return
        for name in self._lengths():
            steps = trainer.estimated_stepping_batches
            for config in trainer.lr_scheduler_configs:
                planned = getattr(config.scheduler, name, steps)
                if planned != steps:
                    raise UserError(
                        f"{self.scheduler.__name__} was configured for {planned:,} steps, but the "
                        f"resumed run would have {steps:,} steps. The learning rates of the steps "
                        "done so far would not match the new schedule.\n"
                        "Resume with the original --trainer.max_epochs or --trainer.max_steps, or "
                        "start a new run."
                    )

    def _lengths(self) -> list[str]:
        """Return the length arguments that the scheduler accepts and the user has not set."""
        given = self.scheduler_args.keys()
        return [name for name in LENGTHS if self._accepts(name) and not given & {name, "epochs"}]

    def _accepts(self, name: str) -> bool:
        return name in inspect.signature(self.scheduler).parameters

    def _scheduler_arguments(self, steps: int) -> dict[str, Any]:
        arguments: dict[str, Any] = dict.fromkeys(self._lengths(), steps)
        if self._accepts("max_lr"):
            arguments["max_lr"] = self.lr
        return arguments | self.scheduler_args


def _find(name: str, kind: str, known: Mapping[str, type]) -> Any:
    found = lookup.find(name, kind, known)
    if not inspect.isclass(found):
        raise UserError(
            f"The {kind} {name!r} is not a class. Use the name or the import path of a class."
        )
    return found


def _build(kind: Any, arguments: Mapping[str, Any], first: Any) -> Any:
    try:
        return kind(first, **arguments)
    except (TypeError, ValueError) as error:
        _, *accepted = inspect.signature(kind).parameters
        raise UserError(
            f"{kind.__name__} cannot be created with {dict(arguments)}: {error}.\n"
            f"It accepts {', '.join(accepted)}."
        ) from error
