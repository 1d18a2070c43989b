"""Weight averaging: averages that start late, and matching running statistics.

Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization",
2018, https://arxiv.org/abs/1803.05407, algorithm 1. Its last line recomputes the
statistics.
"""

import copy
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks
from torch import nn

from bn_lightning.errors import UserError
from bn_lightning.norms import recognition
from bn_lightning.training import lightning_internals, precise_statistics

# What a layer needs so that its statistics can be recomputed.
REQUIRED = ("num_batches_tracked", "reset_running_stats", "momentum")


class StochasticWeightAveraging(callbacks.StochasticWeightAveraging):
    """Lightning's callback, extended to norm layers of any class.

    After training, a pass over the training samples computes the running statistics for
    the averaged weights. Lightning's callback does so for subclasses of torch's
    `_BatchNorm` only. It silently leaves other layers with the statistics of the
    weights before averaging.

    This callback supports every layer that has `num_batches_tracked`,
    `reset_running_stats()` and `momentum`. With `momentum = None`, the layer must give
    all batches the same weight, as `bn_lightning.BatchNorm` does.

    With the callback `PreciseStatistics`, there is no such pass: that callback estimates
    the statistics for the averaged weights.

    Raises:
        UserError: in `fit`, if a layer has running statistics but lacks one of these.
    """

    # Lightning's default for `device` is a torch.device, which config.yaml cannot
    # represent.
    def __init__(self, *args: Any, device: str | None = "cpu", **kwargs: Any) -> None:
        super().__init__(*args, device=device, **kwargs)  # type: ignore[misc]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not precise_statistics.is_used(trainer):
            super().on_fit_start(trainer, pl_module)
            return
        # Without a batch norm, there is no pass for the statistics.
        self.pl_module_contains_batch_norm = lambda pl_module: False  # type: ignore[method-assign]
        try:
            super().on_fit_start(trainer, pl_module)
        finally:
            del self.pl_module_contains_batch_norm

    @staticmethod
    def pl_module_contains_batch_norm(pl_module: pl.LightningModule) -> bool:
        layers = recognition.with_statistics(pl_module)
        for name, layer in layers.items():
            # torch's InstanceNorm has all three attributes, but it does not count
            # batches and does not support a momentum of None.
            is_instance_norm = isinstance(layer, nn.modules.instancenorm._InstanceNorm)
            if is_instance_norm or not all(hasattr(layer, attribute) for attribute in REQUIRED):
                raise UserError(
                    f"The running statistics of {name}, a {type(layer).__name__}, cannot be "
                    "recomputed for averaged weights.\n"
                    "Use --model.norm custom or builtin. A layer of your own needs the "
                    "attributes num_batches_tracked and momentum, and the method "
                    "reset_running_stats(). If momentum is None, its running statistics must be "
                    "means over all batches with equal weights."
                )
        return bool(layers)

    def reset_batch_norm_and_save_state(self, pl_module: pl.LightningModule) -> None:
        self.momenta = {}
        for layer in recognition.with_statistics(pl_module).values():
            layer.reset_running_stats()
            self.momenta[layer] = layer.momentum
            layer.momentum = None
        # Lightning takes an optimizer step after the last batch of this pass. Without
        # this line it would use the gradients of the last training step.
        pl_module.zero_grad()


class AverageFromStart(pl.Callback):
    """Makes Lightning's WeightAveraging validate, save and return meaningful weights.

    Lightning uses the average even before its first update, when it still has the
    initial weights. With this callback, it has the current weights until then. The first
    update copies the current weights in any case, so the later average is the same.

    During validation, Lightning swaps the average with the network. In a 16-bit network,
    this rounds the average to 16 bits. With this callback, it keeps its precision.
    """

    def __init__(self, averaging: callbacks.WeightAveraging) -> None:
        self.averaging = averaging
        self._average: dict[str, Any] | None = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._follow(pl_module)
        average = lightning_internals.average_model(self.averaging)
        if average is not None and _dtype(average) != _dtype(pl_module):
            self._average = copy.deepcopy(average.state_dict())

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        average = lightning_internals.average_model(self.averaging)
        if average is not None and self._average is not None:
            average.load_state_dict(self._average)
        self._average = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # At the end of training, Lightning copies the average to the network.
        self._follow(pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._follow(pl_module)
        # If the averaging callback comes first, `state_dict` is the earlier average.
        average = lightning_internals.average_model(self.averaging)
        if average is not None and average.n_averaged == 0:
            current = checkpoint.get("current_model_state", checkpoint["state_dict"])
            checkpoint["state_dict"] = current

    def _follow(self, pl_module: pl.LightningModule) -> None:
        """Give the average the current weights if it has not been updated yet."""
        average = lightning_internals.average_model(self.averaging)
        if average is not None and average.n_averaged == 0:
            average.module.load_state_dict(pl_module.state_dict())


def _dtype(module: nn.Module) -> torch.dtype | None:
    return next((parameter.dtype for parameter in module.parameters()), None)
