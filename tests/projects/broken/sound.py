"""The sound project, of which the others are variants: small images with five classes."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from bn_lightning import DataModule, Step, Task

CLASSES = 5


class Images(DataModule):
    """480 images (1, 6, 5), of which 120 are for validation and 120 for the test."""

    def setup(self, stage):
        generator = torch.Generator().manual_seed(self.seed)
        self.inputs = torch.randn(480, 1, 6, 5, generator=generator)
        directions = torch.randn(30, CLASSES, generator=generator)
        self.targets = (self.inputs.flatten(1) @ directions).argmax(1)

    def train_dataloader(self):
        return self.train_batches(self.inputs, self.targets, torch.arange(240))

    def val_dataloader(self):
        return self.batches(self.inputs, self.targets, torch.arange(240, 360))

    def test_dataloader(self):
        return self.batches(*self.test_samples())

    def test_samples(self):
        if not hasattr(self, "inputs"):
            self.setup("test")
        return self.inputs[360:], self.targets[360:]


class Network(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.convolution = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = self.make_norm(width)
        self.head = nn.Linear(30 * width, CLASSES)

    def make_norm(self, width):
        return nn.BatchNorm2d(width)

    def features(self, x):
        return F.relu(self.norm(self.convolution(x))).flatten(1)

    def forward(self, x):
        return self.head(self.features(x))


class Classification(Task):
    """The task. Its variants override one method, or name another network.

    Args:
        width: channels of the convolution.
        training: further settings of `Task`.
    """

    selects = ("val_acc", "max")
    network_class: type[nn.Module] = Network

    def __init__(self, width: int = 6, **training: Any) -> None:
        # With positional arguments, variants that inherit this would have no flag --model.lr.
        metrics = {"acc": self.make_metric()}
        super().__init__(network=self.network_class(width), metrics=metrics, **training)

    def make_metric(self):
        return MulticlassAccuracy(CLASSES, average="micro")

    def loss(self, outputs, targets):
        return F.cross_entropy(outputs, targets)

    def step(self, batch, stage):
        inputs, targets = batch
        outputs = self(inputs)
        return Step(self.loss(outputs, targets), outputs, targets, len(targets))
