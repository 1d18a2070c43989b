"""Batch normalization synchronized across processes, for `Trainer(sync_batchnorm=True)`."""

import lightning.pytorch as pl
from lightning.pytorch.plugins import TorchSyncBatchNorm
from torch import nn

from bn_lightning.errors import UserError
from bn_lightning.norms import recognition
from bn_lightning.norms.convert import TORCH
from bn_lightning.norms.layer import BatchNorm


class LayerSync(TorchSyncBatchNorm):
    """Lightning's plugin for `sync_batchnorm`, extended to more layers and to CPUs.

    Use it as `Trainer(sync_batchnorm=True, plugins=[LayerSync()])`. Lightning's own
    plugin supports only PyTorch's layers on CUDA. During `fit`, this one supports:

    * layers with a boolean attribute `sync_batchnorm`, such as `bn_lightning.BatchNorm`: the
      attribute is set to True;
    * PyTorch's layers: their class becomes `nn.SyncBatchNorm` on CUDA, and `bn_lightning.BatchNorm`
      elsewhere, because `nn.SyncBatchNorm` requires CUDA.

    Raises:
        UserError: `fit` finds another layer with running statistics.
    """

    def __init__(self) -> None:
        self._flagged: list[nn.Module] = []
        self._original_classes: dict[nn.Module, type[nn.Module]] = {}

    def apply(self, model: nn.Module) -> nn.Module:
        """Synchronize the layers of a LightningModule on its trainer's device."""
        assert isinstance(model, pl.LightningModule)
        return self.synchronize(model, model.trainer.strategy.root_device.type)

    def synchronize(self, model: nn.Module, device_type: str) -> nn.Module:
        """Synchronize the layers of any module that will run on a device of this type."""
        with_statistics = recognition.with_statistics(model)
        synchronized_class = nn.SyncBatchNorm if device_type == "cuda" else BatchNorm
        for name, module in model.named_modules():
            if type(module) in TORCH.values():
                self._original_classes[module] = type(module)
                # The two synchronized classes have attributes that the original class
                # lacks. process_group=None means all processes.
                module.__dict__.update(process_group=None, num_dims=None, sync_batchnorm=True)
                module.__class__ = synchronized_class
            elif isinstance(getattr(module, "sync_batchnorm", None), bool):
                self._flagged.append(module)
                module.__dict__["sync_batchnorm"] = True
            elif name in with_statistics:
                self.revert(model)
                raise UserError(
                    f"The layer {name}, a {type(module).__name__}, does not support "
                    "sync_batchnorm.\n"
                    "The norms custom and builtin support it. A layer of your own needs an "
                    "attribute sync_batchnorm, initially False. While it is True, the layer must "
                    "use the statistics of all processes.\n"
                    "To let each process normalize its own shard of the batch, set "
                    "--trainer.sync_batchnorm false."
                )
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Undo `synchronize`."""
        for module in self._flagged:
            module.__dict__["sync_batchnorm"] = False
        for module, original_class in self._original_classes.items():
            module.__class__ = original_class
        self._flagged, self._original_classes = [], {}
        return model
