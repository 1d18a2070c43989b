"""Batch normalization synchronized over processes, for `Trainer(sync_batchnorm=True)`."""

import lightning.pytorch as pl
from lightning.pytorch.plugins import TorchSyncBatchNorm
from torch import nn

from bn_lightning.errors import UserError
from bn_lightning.norms import recognition
from bn_lightning.norms.convert import TORCH
from bn_lightning.norms.layer import BatchNorm


class LayerSync(TorchSyncBatchNorm):
    """Lightning's plugin for `sync_batchnorm`, for more layers.

    Used as `Trainer(sync_batchnorm=True, plugins=[LayerSync()])`. Lightning's own plugin knows only
    torch's layers, on CUDA. While `fit` runs, this one sets `sync_batchnorm` to True in each layer
    that has such an attribute, such as `bn_lightning.BatchNorm`. It gives torch's layers the class
    `nn.SyncBatchNorm` on CUDA, which that class needs, and `bn_lightning.BatchNorm` elsewhere.

    Raises:
        UserError: from `fit`, for a layer with running statistics that is neither.
    """

    def __init__(self) -> None:
        self._flagged: list[nn.Module] = []
        self._original_classes: dict[nn.Module, type[nn.Module]] = {}

    def apply(self, model: nn.Module) -> nn.Module:
        assert isinstance(model, pl.LightningModule)
        return self.synchronize(model, model.trainer.strategy.root_device.type)

    def synchronize(self, model: nn.Module, device_type: str) -> nn.Module:
        """Do what `apply` does, for any module that will run on that type of device."""
        with_statistics = recognition.with_statistics(model)
        synchronized_class = nn.SyncBatchNorm if device_type == "cuda" else BatchNorm
        for name, module in model.named_modules():
            if type(module) in TORCH.values():
                self._original_classes[module] = type(module)
                # These are the attributes of the two classes that torch's other classes lack.
                # The process group None is the group of all processes.
                module.__dict__.update(process_group=None, num_dims=None, sync_batchnorm=True)
                module.__class__ = synchronized_class
            elif isinstance(getattr(module, "sync_batchnorm", None), bool):
                self._flagged.append(module)
                module.__dict__["sync_batchnorm"] = True
            elif name in with_statistics:
                self.revert(model)
                raise UserError(
                    f"sync_batchnorm was asked for, and {name}, a {type(module).__name__}, "
                    "cannot do it.\n"
                    "What can: the norms custom and builtin, and a layer of yours with an "
                    "attribute sync_batchnorm, False at first, that takes its statistics over all "
                    "processes while it is True.\n"
                    "Without, each process normalizes its own share: "
                    "--trainer.sync_batchnorm false"
                )
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        for module in self._flagged:
            module.__dict__["sync_batchnorm"] = False
        for module, original_class in self._original_classes.items():
            module.__class__ = original_class
        self._flagged, self._original_classes = [], {}
        return model
