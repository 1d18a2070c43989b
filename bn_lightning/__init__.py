"""LeNet on Fashion-MNIST with pluggable batch normalization, in PyTorch Lightning."""

from typing import TYPE_CHECKING, Any

from bn_lightning import lazy

if TYPE_CHECKING:
    from bn_lightning.data.fashion_mnist import FashionMNIST as FashionMNIST
    from bn_lightning.data.image_data import ImageData as ImageData
    from bn_lightning.errors import UserError as UserError
    from bn_lightning.monitoring.figures import ClosingPictures as ClosingPictures
    from bn_lightning.monitoring.norm_monitor import NormMonitor as NormMonitor
    from bn_lightning.networks.lenet import LeNet as LeNet
    from bn_lightning.norms.convert import from_torch as from_torch
    from bn_lightning.norms.convert import to_torch as to_torch
    from bn_lightning.norms.estimation import estimate_statistics as estimate_statistics
    from bn_lightning.norms.layer import BatchNorm as BatchNorm
    from bn_lightning.norms.layer import batch_norm as batch_norm
    from bn_lightning.norms.replace import replace_norms as replace_norms
    from bn_lightning.norms.sync import LayerSync as LayerSync
    from bn_lightning.runs.experiment import Experiment as Experiment
    from bn_lightning.tasks.classifier import Classifier as Classifier
    from bn_lightning.training.averaging import (
        StochasticWeightAveraging as StochasticWeightAveraging,
    )
    from bn_lightning.training.checkpoints import WholeCheckpointIO as WholeCheckpointIO
    from bn_lightning.training.data_module import DataModule as DataModule
    from bn_lightning.training.exact_data_loader import ExactDataLoader as ExactDataLoader
    from bn_lightning.training.precise_statistics import PreciseStatistics as PreciseStatistics
    from bn_lightning.training.resume import ExactResume as ExactResume
    from bn_lightning.training.task import Step as Step
    from bn_lightning.training.task import Task as Task

__version__ = "0.2.0"

# Maps each public name to its module. Modules are imported on first use, so that
# `--help` does not import torch. A module must not have the same name as one of these
# objects: it would hide it.
_MODULES = {
    "BatchNorm": "norms.layer",
    "batch_norm": "norms.layer",
    "Classifier": "tasks.classifier",
    "ClosingPictures": "monitoring.figures",
    "DataModule": "training.data_module",
    "ExactDataLoader": "training.exact_data_loader",
    "ExactResume": "training.resume",
    "Experiment": "runs.experiment",
    "FashionMNIST": "data.fashion_mnist",
    "ImageData": "data.image_data",
    "LayerSync": "norms.sync",
    "LeNet": "networks.lenet",
    "NormMonitor": "monitoring.norm_monitor",
    "PreciseStatistics": "training.precise_statistics",
    "Step": "training.task",
    "StochasticWeightAveraging": "training.averaging",
    "Task": "training.task",
    "UserError": "errors",
    "WholeCheckpointIO": "training.checkpoints",
    "estimate_statistics": "norms.estimation",
    "from_torch": "norms.convert",
    "replace_norms": "norms.replace",
    "to_torch": "norms.convert",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    return lazy.load(__name__, _MODULES, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
