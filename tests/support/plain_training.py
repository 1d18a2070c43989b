"""Training with Lightning alone: a residual network and samples with random numbers."""

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from bn_lightning.training import seeds
from bn_lightning.training.fixed_batches import first_batches


class Rows(Dataset):
    """52 samples (3, 9, 7) whose noise is drawn from the global generators."""

    def __len__(self):
        return 52

    def __getitem__(self, index):
        x = torch.linspace(-1, 1, 189).view(3, 9, 7) * (index % 7 - 2)
        x = x + 0.3 * torch.randn(3, 9, 7) + float(np.random.rand())
        return x, index % 4


class Block(nn.Module):
    """A residual block."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels, momentum=0.01)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(y)))


class Residual(pl.LightningModule):
    """A small residual network with dropout, of PyTorch's layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            Block(6),
            Block(6),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(6, 4),
        )

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def best(folder):
    return ModelCheckpoint(
        folder, filename="best", monitor="val_loss", enable_version_counter=False
    )


def shuffled():
    return DataLoader(Rows(), 8, shuffle=True)


def validation_loader():
    torch.manual_seed(5)
    return DataLoader(TensorDataset(torch.randn(20, 3, 9, 7), torch.arange(20) % 4), 8)


def fit(callbacks, loader, folder, module=None, trainer_settings=None):
    """Train for 3 epochs, and return the module and the trainer."""
    module = module or Residual()
    settings = {"max_epochs": 3, **QUIET, "default_root_dir": folder, **(trainer_settings or {})}
    trainer = pl.Trainer(callbacks=callbacks, **settings)
    validation = validation_loader()
    pl.seed_everything(1, verbose=False)
    trainer.fit(module, loader(), validation)
    return module, trainer


def inputs_of(precise, loader):
    """Return the inputs of an estimate by PreciseStatistics, as a trainer would draw them."""
    seeds.seed_fetch(precise.seed, 0, 0, 0, torch.device("cpu"))
    return [batch[0] for batch in first_batches(loader(), precise.num_batches, precise.seed)]
