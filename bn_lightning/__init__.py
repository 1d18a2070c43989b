"""LeNet on Fashion-MNIST with a batch normalization that can be swapped, in PyTorch Lightning."""

import importlib
from typing import Any

__version__ = "0.1.0"

# Where each public name lives. Looked up on first use: `bn_lightning --help` must not pay for torch.
_HOMES = {
    "BatchNorm": "batch_norm",
    "batch_norm": "batch_norm",
    "Classifier": "classifier",
    "FashionMNIST": "fashion_mnist",
    "LeNet": "lenet",
    "UserError": "errors",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # else the submodule, imported under the same name, would hide the function
    return value
