"""LeNet on Fashion-MNIST with a batch normalization that can be swapped, in PyTorch Lightning."""

import importlib
from typing import Any

__version__ = "0.1.0"

# Where each public name lives. Looked up on first use: `bn_lightning --help` must not pay for torch.
_HOMES = {
    "BatchNorm": "batchnorm",  # no module may bear a name of this list: it would hide what it holds
    "batch_norm": "batchnorm",
    "Classifier": "classifier",
    "FashionMNIST": "fashion_mnist",
    "LeNet": "lenet",
    "UserError": "errors",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
