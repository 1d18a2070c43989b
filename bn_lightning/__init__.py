"""LeNet on Fashion-MNIST with a batch normalization that can be swapped, in PyTorch Lightning."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bn_lightning.averaging import StochasticWeightAveraging as StochasticWeightAveraging
    from bn_lightning.batchnorm import BatchNorm as BatchNorm
    from bn_lightning.batchnorm import batch_norm as batch_norm
    from bn_lightning.checkpoints import WholeCheckpointIO as WholeCheckpointIO
    from bn_lightning.classifier import Classifier as Classifier
    from bn_lightning.convert import from_torch as from_torch
    from bn_lightning.convert import to_torch as to_torch
    from bn_lightning.errors import UserError as UserError
    from bn_lightning.fashion_mnist import FashionMNIST as FashionMNIST
    from bn_lightning.lenet import LeNet as LeNet
    from bn_lightning.monitors import ClosingPictures as ClosingPictures
    from bn_lightning.monitors import NormMonitor as NormMonitor
    from bn_lightning.resume import ExactResume as ExactResume
    from bn_lightning.sync import LayerSync as LayerSync

__version__ = "0.1.0"

# Where each public name lives. Looked up on first use: `bn_lightning --help` must not pay for torch.
_HOMES = {
    "BatchNorm": "batchnorm",  # no module may bear a name of this list: it would hide what it holds
    "batch_norm": "batchnorm",
    "Classifier": "classifier",
    "ClosingPictures": "monitors",
    "ExactResume": "resume",
    "FashionMNIST": "fashion_mnist",
    "LayerSync": "sync",
    "LeNet": "lenet",
    "NormMonitor": "monitors",
    "StochasticWeightAveraging": "averaging",
    "UserError": "errors",
    "WholeCheckpointIO": "checkpoints",
    "from_torch": "convert",
    "to_torch": "convert",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
