"""A callback that records what is learned, and ends training when the loss is low."""

import math
from typing import Any

import lightning.pytorch as pl
import torch


class Watch(pl.Callback):
    """Record losses and gradients, and end training when the loss is low.

    Args:
        fraction: the fraction of the first loss at which training ends.

    Attributes:
        losses: the loss of each step.
        without_gradient: names of the parameters that have had no gradient, or only zero.
        left_out: names of the parameters that no optimizer has.
    """

    def __init__(self, fraction: float) -> None:
        self.fraction = fraction
        self.losses: list[float] = []
        self.without_gradient: set[str] = set()
        self.left_out: list[str] = []

    @property
    def target(self) -> float:
        """The loss to reach. It is below a first loss that is negative too."""
        first = self.losses[0]
        return first - (1 - self.fraction) * abs(first)

    @property
    def has_fallen(self) -> bool:
        return bool(self.losses) and min(self.losses) <= self.target

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trained = {
            id(parameter)
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        parameters = _trainable(pl_module)
        self.without_gradient = set(parameters)
        self.left_out = [name for name, value in parameters.items() if id(value) not in trained]

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, parameter in _trainable(pl_module).items():
            if parameter.grad is not None and bool(parameter.grad.any()):
                self.without_gradient.discard(name)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if loss is None:
            return
        self.losses.append(float(loss))
        # A few steps more, so that running statistics have moved.
        if not math.isfinite(self.losses[-1]) or (self.has_fallen and len(self.losses) >= 8):
            trainer.should_stop = True


def _trainable(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: value for name, value in module.named_parameters() if value.requires_grad}
