"""Experiments with a plain DataLoader, which cannot be resumed within an epoch."""

import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from bn_lightning import Experiment
from tests.projects.friedman.experiment import Regression, Table


class Shuffled(Table):
    """200 rows in 10 batches, shuffled by torch's generator."""

    def train_dataloader(self):
        rows = TensorDataset(self.inputs[: self.rows], self.targets[: self.rows])
        return DataLoader(rows, self.batch_size, shuffle=True)


class Rows(IterableDataset):
    def __init__(self, inputs, targets):
        self.inputs, self.targets = inputs, targets

    def __iter__(self):
        return zip(self.inputs, self.targets, strict=True)


class Stream(Table):
    """The same rows from a loader without a length."""

    def train_dataloader(self):
        rows = Rows(self.inputs[: self.rows], self.targets[: self.rows])
        return DataLoader(rows, self.batch_size)


SMALL = {
    "data.rows": 200,
    "data.batch_size": 20,
    "trainer.max_epochs": 2,
    "trainer.accelerator": "cpu",
    "model.lr": 0.01,
}
EXPERIMENT = Experiment(Regression, Shuffled, "plain", SMALL)
STREAM = Experiment(Regression, Stream, "stream", SMALL)


def rows_of_a_line():
    """Return a data set of 40 points, for a module that is not a Task."""
    x = torch.linspace(0, 1, 40).unsqueeze(1)
    return TensorDataset(x, 2 * x)
