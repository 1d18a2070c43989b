"""Stochastic weight averaging with running statistics that fit the averaged weights, for norms of any class.

Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", 2018,
https://arxiv.org/abs/1803.05407, algorithm 1, whose last line computes the statistics.
"""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import callbacks
from torch import nn

from bn_lightning.errors import UserError
from bn_lightning.norms import recognition


class StochasticWeightAveraging(callbacks.StochasticWeightAveraging):
    """Lightning's callback, which ends with a pass over the training samples for the statistics of averaged weights.

    Lightning's own takes that pass for subclasses of torch's `_BatchNorm` only, and without a word leaves other layers
    with the statistics of other weights. This one takes it for any layer with `num_batches_tracked`,
    `reset_running_stats()` and a `momentum` whose None averages all batches alike, as `bn_lightning.BatchNorm` has.

    Raises:
        UserError: from `fit`, for a layer with running statistics and without one of these.
    """

    # Lightning's default for device is no text, and a config.yaml with it cannot be read again.
    def __init__(self, *args: Any, device: str | None = "cpu", **kwargs: Any) -> None:
        super().__init__(*args, device=device, **kwargs)  # type: ignore[misc]  # args without device

    @staticmethod
    def pl_module_contains_batch_norm(pl_module: pl.LightningModule) -> bool:
        needed = ("num_batches_tracked", "reset_running_stats", "momentum")
        layers = recognition.with_statistics(pl_module)
        for name, layer in layers.items():
            # torch's InstanceNorm has them all, and neither counts batches nor knows a momentum of None.
            if isinstance(layer, nn.modules.instancenorm._InstanceNorm) or not all(
                hasattr(layer, n) for n in needed
            ):
                raise UserError(
                    f"The statistics of {name}, a {type(layer).__name__}, cannot be taken anew for averaged weights.\n"
                    "Those of the norms custom and builtin can, and of a layer of yours with num_batches_tracked, "
                    "reset_running_stats() and a momentum whose None averages all batches alike: --model.norm custom"
                )
        return bool(layers)

    def reset_batch_norm_and_save_state(self, pl_module: pl.LightningModule) -> None:
        self.momenta = {}
        for layer in recognition.with_statistics(pl_module).values():
            layer.reset_running_stats()
            self.momenta[layer] = layer.momentum
            layer.momentum = None
        # The last batch of the pass takes an optimizer step all the same, by the gradients of the last one in training.
        pl_module.zero_grad()
