"""Optimizer and learning-rate scheduler, created from their names and validated before a run.

To add a setting, add an argument to `Task`, which makes it a flag, and pass it to
`Optimization`.
"""

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from bn_lightning import lookup
from bn_lightning.errors import UserError
from bn_lightning.training import monitors
from bn_lightning.training.run_length import optimizer_steps

# Scheduler arguments that state the length of the run in optimizer steps.
LENGTHS = ("total_steps", "T_max")

# Parameter groups of an optimizer, each with the key `params`.
Groups = list[dict[str, Any]]


class Optimization:
    """The optimizer and the scheduler that the settings name. For the arguments, see `Task`.

    Attributes:
        monitor: the metric that ReduceLROnPlateau monitors; None for other schedulers.

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
        warmup_steps: int = 0,
    ) -> None:
        if warmup_steps < 0:
            raise UserError(
                f"warmup_steps is {warmup_steps}; it must not be negative, for example "
                "--model.warmup_steps 100."
            )
        self.warmup_steps = warmup_steps
        schedulers = torch.optim.lr_scheduler
        self.lr = lr
        self.optimizer = _find(optimizer, "optimizer", lookup.classes_in(torch.optim, Optimizer))
        self.optimizer_args = dict(optimizer_args or {})
        self.scheduler: Any = None
        if scheduler is not None:
            known = lookup.classes_in(schedulers, LRScheduler)
            self.scheduler = _find(scheduler, "scheduler", known)
        self.scheduler_args = dict(scheduler_args or {})
        self.monitor: str | None = None
        if self.scheduler is not None and issubclass(self.scheduler, ReduceLROnPlateau):
            self.monitor = self.scheduler_args.get("monitor", "val_loss")
            # The class of lightning.pytorch.cli takes it as an argument, torch's does not.
            if not self._accepts("monitor"):
                self.scheduler_args.pop("monitor", None)

    def check(self, groups: Groups) -> None:
        """Create and update both once, so that wrong arguments are reported before a run starts.

        Raises:
            UserError: the optimizer or the scheduler does not accept an argument.
        """
        arguments = {"lr": self.lr, **self.optimizer_args}
        optimizer = _build(self.optimizer, arguments, groups)
        if self.scheduler is not None:
            arguments = self._scheduler_arguments(steps=1_000)
            _build(self.scheduler, arguments, optimizer, self._update_once)

    def _update_once(self, scheduler: Any) -> None:
        with warnings.catch_warnings():
            # The optimizer has made no step.
            warnings.simplefilter("ignore")
            scheduler.step(*([1.0] if self.monitor else []))

    def configure(self, groups: Groups, get_trainer: Callable[[], pl.Trainer]) -> Any:
        """Return the result of a LightningModule's `configure_optimizers`.

        Args:
            get_trainer: returns the trainer; called only if the scheduler needs it.

        Raises:
            UserError: the scheduler needs the length of the run, but the run has no
                limit.
        """
        optimizer = self.optimizer(groups, lr=self.lr, **self.optimizer_args)
        if self.warmup_steps:
            self._warm_up(optimizer, get_trainer)
        if self.scheduler is None:
            return optimizer
        lengths = self._lengths()
        steps = optimizer_steps(get_trainer()) if lengths else 0
        if steps == float("inf"):
            raise UserError(
                f"{self.scheduler.__name__} needs the number of training steps, but the run "
                "has no limit, or its training loader has no length.\n"
                "Set --trainer.max_epochs, --trainer.max_steps or "
                f"--model.scheduler_args.{lengths[0]}."
            )
        scheduler = self.scheduler(optimizer, **self._scheduler_arguments(int(steps)))
        # A scheduler counts steps if it was given their number, or has `max_lr`
        # (OneCycleLR, CyclicLR). Others count epochs.
        counts_steps = self._accepts("max_lr") or self._accepts("total_steps")
        config = {
            "scheduler": scheduler,
            "interval": "step" if lengths or counts_steps else "epoch",
        }
        if self.monitor is not None:
            config["monitor"] = self.monitor
            if monitors.is_of_validation(self.monitor):
                # No metric is missing: there may be epochs without validation.
                config["frequency"] = get_trainer().check_val_every_n_epoch or 1
                config["strict"] = False
        return {"optimizer": optimizer, "lr_scheduler": config}

    def override(self, optimizer: Optimizer, groups: Groups) -> None:
        """Give a resumed optimizer the current settings instead of those of its checkpoint.

        Args:
            groups: see `configure`.
        """
        for group, own in zip(optimizer.param_groups, groups, strict=True):
            settings = {"lr": self.lr, **self.optimizer_args, **own}
            group.update({name: value for name, value in settings.items() if name != "params"})

    def _warm_up(self, optimizer: Optimizer, get_trainer: Callable[[], pl.Trainer]) -> None:
        """Let the learning rates grow linearly in the first steps.

        They are scaled only during each step, because some schedulers compute the next
        rate from the current one.
        """
        rates: list[float] = []

        def scale(*_: Any) -> None:
            factor = min(1.0, (get_trainer().global_step + 1) / self.warmup_steps)
            rates[:] = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = factor * group["lr"]

        def restore(*_: Any) -> None:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

        optimizer.register_step_pre_hook(scale)
        optimizer.register_step_post_hook(restore)

    def refuse_other_length(self, trainer: pl.Trainer) -> None:
        """Refuse a schedule whose length is not that of the run.

        Raises:
            UserError: the run has another number of steps than the schedule. In a
                resumed run, the steps done so far had other learning rates.
        """
        if self.scheduler is None:
            return
        names = self._lengths()
        steps = optimizer_steps(trainer) if names or self.scheduler is OneCycleLR else 0
        for config in trainer.lr_scheduler_configs:
            schedule = config.scheduler
            # After its last step, OneCycleLR raises an error.
            if not names and isinstance(schedule, OneCycleLR) and schedule.total_steps < steps:
                raise UserError(
                    f"OneCycleLR is set to {schedule.total_steps:,} steps, but the run has "
                    f"{steps:,}.\nRemove --model.scheduler_args.total_steps (or `epochs` and "
                    "`steps_per_epoch`), so that it covers the run."
                )
            for name in names:
                planned = getattr(schedule, name, steps)
                if planned != steps and trainer.global_step == 0:
                    raise UserError(
                        f"{self.scheduler.__name__} was configured for {planned:,} steps, but a "
                        f"callback has changed the run to {steps:,} steps, as "
                        "StochasticWeightAveraging does.\n"
                        "Use another scheduler, or remove the callback."
                    )
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


def parameter_groups(
    module: nn.Module, norms: Iterable[nn.Module], decay_norms_and_biases: bool
) -> Groups:
    """Return the parameters, and those without weight decay in a group of their own."""
    exempt: dict[nn.Parameter, None] = {}
    if not decay_norms_and_biases:
        for layer in norms:
            exempt |= dict.fromkeys(layer.parameters())
        names = module.named_parameters()
        exempt |= {p: None for name, p in names if name.rpartition(".")[2] == "bias"}
    decayed = [p for p in module.parameters() if p not in exempt]
    groups: Groups = [{"params": decayed}, {"params": [*exempt], "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _find(name: str, kind: str, known: Mapping[str, type]) -> Any:
    found = lookup.find(name, kind, known)
    if not inspect.isclass(found):
        raise UserError(
            f"The {kind} {name!r} is not a class. Use the name or the import path of a class."
        )
    return found


def _build(
    kind: Any, arguments: Mapping[str, Any], first: Any, use: Callable[[Any], None] | None = None
) -> Any:
    try:
        built = kind(first, **arguments)
        if use is not None:
            use(built)
        return built
    except Exception as error:
        # Other errors of a user's class are bugs, and keep their stack trace.
        is_of_torch = kind.__module__.startswith("torch.")
        if not is_of_torch and not isinstance(error, (TypeError, ValueError)):
            raise
        first_name = next(iter(inspect.signature(kind).parameters))
        raise UserError(
            f"{kind.__name__} cannot be created with {dict(arguments)}: {error}.\n"
            + lookup.describe_arguments(kind, arguments, passed=[first_name])
        ) from error
