"""Batch normalization in step across processes, for `Trainer(sync_batchnorm=True)`."""

import lightning.pytorch as pl
from lightning.pytorch.plugins import TorchSyncBatchNorm
from torch import nn

from bn_lightning.errors import UserError
from bn_lightning.norms import recognition
from bn_lightning.norms.convert import TORCH
from bn_lightning.norms.layer import BatchNorm


class LayerSync(TorchSyncBatchNorm):
    """Lightning's plugin for `sync_batchnorm`, for more layers: `Trainer(sync_batchnorm=True, plugins=[LayerSync()])`.

    Lightning's own knows torch's layers on CUDA only. While `fit` runs, this one sets `sync_batchnorm` to True in each
    layer that has such an attribute, `bn_lightning.BatchNorm` first of all, and gives torch's layers the class
    `nn.SyncBatchNorm` on CUDA, which it is written for, and `bn_lightning.BatchNorm` elsewhere.

    Raises:
        UserError: from `fit`, for a layer with running statistics that is neither.
    """

    def __init__(self) -> None:
        self._told: list[nn.Module] = []
        self._classes: dict[nn.Module, type[nn.Module]] = {}

    def apply(self, model: nn.Module) -> nn.Module:
        assert isinstance(model, pl.LightningModule)
        return self.put_in_step(model, model.trainer.strategy.root_device.type)

    def put_in_step(self, model: nn.Module, device_type: str) -> nn.Module:
        """What `apply` does, for any module that will run on that type of device."""
        with_statistics = recognition.with_statistics(model)
        its_class = nn.SyncBatchNorm if device_type == "cuda" else BatchNorm
        for name, module in model.named_modules():
            if type(module) in TORCH.values():
                self._classes[module] = type(module)
                # What the two classes have beyond torch's others; None is the group of all processes.
                module.__dict__.update(process_group=None, num_dims=None, sync_batchnorm=True)
                module.__class__ = its_class
            elif isinstance(getattr(module, "sync_batchnorm", None), bool):
                self._told.append(module)
                module.__dict__["sync_batchnorm"] = True
            elif name in with_statistics:
                self.revert(model)
                raise UserError(
                    f"sync_batchnorm was asked for, and {name}, a {type(module).__name__}, cannot do it.\n"
                    "What can: the norms custom and builtin, and a layer of yours with an attribute sync_batchnorm, "
                    "False at first, that takes its statistics over all processes while it is True.\n"
                    "Without, each process normalizes its own share: --trainer.sync_batchnorm false"
                )
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        for module in self._told:
            module.__dict__["sync_batchnorm"] = False
        for module, its_class in self._classes.items():
            module.__class__ = its_class
        self._told, self._classes = [], {}
        return model
