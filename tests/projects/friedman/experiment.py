"""A project without images and classes: regression on a table, with a metric to minimize.

The data are Friedman's first problem (Friedman 1991, "Multivariate Adaptive Regression Splines",
section 4.3): y = 10 sin(pi x1 x2) + 20 (x3 - 0.5)^2 + 10 x4 + 5 x5 + noise. x is uniform on
[0, 1]^10, and the noise has a standard deviation of 1, which is a lower bound of the error.
"""

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanSquaredError, R2Score

from bn_lightning import DataModule, Experiment, Step, Task
from bn_lightning.errors import UserError
from bn_lightning.norms import registry


class Perceptron(nn.Sequential):
    def __init__(self, width: int, norm: str) -> None:
        super().__init__(
            nn.Linear(10, width),
            registry.make(norm, width, 2),
            nn.ReLU(),
            nn.Linear(width, 1),
            nn.Flatten(0),
        )


class Regression(Task):
    """A perceptron trained with the squared error.

    Args:
        width: units of the hidden layer.
        norm: the normalization layer.
        training: further settings of `Task`.
    """

    selects = ("val_rmse", "min")
    import_paths = ("norm", *Task.import_paths)

    def __init__(self, width: int = 32, norm: str = "custom", **training: Any) -> None:
        metrics = {"rmse": MeanSquaredError(squared=False), "r2": R2Score()}
        super().__init__(network=Perceptron(width, norm), metrics=metrics, **training)

    def step(self, batch: tuple[Tensor, Tensor], stage: str) -> Step:
        inputs, targets = batch
        outputs = self(inputs)
        return Step(F.mse_loss(outputs, targets), outputs, targets, len(targets))


class Table(DataModule):
    """Friedman's first problem.

    Args:
        rows: number of training rows. There are half as many for validation, and as many for the
            test.
        fold: 0, 1 or 2: the third of the training and validation rows that is the validation set.
        folder: a machine setting without effect.
        loading: further settings of `DataModule`.
    """

    machine_settings = ("folder",)
    fixed_settings = {
        **DataModule.fixed_settings,
        "rows": "rows that were trained on would move",
        "fold": "validation rows would have been trained on",
    }
    repetitions = ("fold",)

    def __init__(
        self, rows: int = 1_000, fold: int = 2, folder: str = "tables", **loading: Any
    ) -> None:
        super().__init__(**loading)
        if fold not in range(3):
            raise UserError(f"fold is {fold}; it must be 0, 1 or 2.")
        self.rows = rows
        self.fold = fold

    def setup(self, stage: str) -> None:
        random = np.random.default_rng(self.seed)
        x = random.random((self.rows * 5 // 2, 10))
        y = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2
        y += 10 * x[:, 3] + 5 * x[:, 4] + random.normal(size=len(x))
        self.checksum = hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest()
        self.inputs = torch.tensor(x, dtype=torch.float32)
        self.targets = torch.tensor(y, dtype=torch.float32)

    def train_dataloader(self) -> Any:
        rows = torch.arange(self.rows * 3 // 2)
        is_held_out = torch.isin(rows, self.held_out())
        return self.train_batches(self.inputs, self.targets, rows[~is_held_out])

    def val_dataloader(self) -> Any:
        return self.batches(self.inputs, self.targets, self.held_out())

    def held_out(self) -> Tensor:
        return torch.arange(self.fold * self.rows // 2, (self.fold + 1) * self.rows // 2)

    def test_dataloader(self) -> Any:
        return self.batches(*self.test_samples())

    def test_samples(self) -> tuple[Tensor, Tensor]:
        if not hasattr(self, "inputs"):
            self.setup("test")
        return self.inputs[self.rows * 3 // 2 :], self.targets[self.rows * 3 // 2 :]

    def identity(self) -> dict[str, Any]:
        return {"source": "formula", "sha256": {"table": self.checksum}}

    def describe(self) -> str:
        return f"Friedman's problem, {self.rows:,} rows"


EXPERIMENT = Experiment(
    task=Regression,
    data=Table,
    name="friedman",
    defaults={
        "trainer.max_epochs": 3,
        "data.batch_size": 64,
        "model.lr": 0.03,
        "model.optimizer": "AdamW",
    },
)
