"""LeNet on Fashion-MNIST with a batch normalization that can be swapped, in PyTorch Lightning."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bn_lightning.data.fashion_mnist import FashionMNIST as FashionMNIST
    from bn_lightning.errors import UserError as UserError
    from bn_lightning.monitoring.norm_monitor import ClosingPictures as ClosingPictures
    from bn_lightning.monitoring.norm_monitor import NormMonitor as NormMonitor
    from bn_lightning.networks.lenet import LeNet as LeNet
    from bn_lightning.norms.convert import from_torch as from_torch
    from bn_lightning.norms.convert import to_torch as to_torch
    from bn_lightning.norms.layer import BatchNorm as BatchNorm
    from bn_lightning.norms.layer import batch_norm as batch_norm
    from bn_lightning.norms.sync import LayerSync as LayerSync
    from bn_lightning.tasks.classifier import Classifier as Classifier
    from bn_lightning.training.averaging import StochasticWeightAveraging as StochasticWeightAveraging
    from bn_lightning.training.checkpoints import WholeCheckpointIO as WholeCheckpointIO
    from bn_lightning.training.resume import ExactResume as ExactResume

__version__ = "0.1.0"

# Where each public name lives. Looked up on first use: `bn_lightning --help` must not pay for torch.
_HOMES = {
    "BatchNorm": "norms.layer",  # no module may bear a name of this list: it would hide what it holds
    "batch_norm": "norms.layer",
    "Classifier": "tasks.classifier",
    "ClosingPictures": "monitoring.norm_monitor",
    "ExactResume": "training.resume",
    "FashionMNIST": "data.fashion_mnist",
    "LayerSync": "norms.sync",
    "LeNet": "networks.lenet",
    "NormMonitor": "monitoring.norm_monitor",
    "StochasticWeightAveraging": "training.averaging",
    "UserError": "errors",
    "WholeCheckpointIO": "training.checkpoints",
    "from_torch": "norms.convert",
    "to_torch": "norms.convert",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
