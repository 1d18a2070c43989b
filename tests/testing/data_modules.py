"""A correct data module of small images in memory, in a Dataset and in plain DataLoaders.

`data_mutants.py` breaks them, one property at a time.
"""

import sys
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from bn_lightning import Classifier, DataModule, ExactDataLoader, Experiment
from bn_lightning.training import seeds

NUM_TRAIN, NUM_VAL, NUM_TEST = 192, 36, 60


class Scaled(nn.Module):
    """uint8 (N, 8, 8) to float32 (N, 1, 8, 8) around 0."""

    def forward(self, images):
        return (images.float() / 255 - 0.5).reshape(-1, 1, 8, 8)


def noise(count, seed):
    """Return images, uint8 (N, 8, 8), and their labels from 0 to 2, int64 (N,)."""
    random = np.random.default_rng(seed)
    images = torch.from_numpy(random.integers(0, 256, (count, 8, 8), np.uint8))
    return images, torch.from_numpy(random.integers(0, 3, count))


class InMemory(DataModule):
    in_channels, image_size, num_classes = 1, (8, 8), 3
    classes = ("ant", "bee", "cat")

    def __init__(self, **loading: Any) -> None:
        super().__init__(**loading)
        self.preprocessing = Scaled()

    def read(self):
        """Return the images and labels of the training and validation, and of the test."""
        return *noise(NUM_TRAIN + NUM_VAL, 1), *noise(NUM_TEST, 2)

    def held_out(self):
        """Return the indices of the validation samples."""
        order = seeds.for_split(self.seed).permutation(len(self.labels))
        return torch.from_numpy(order[:NUM_VAL])

    def setup(self, stage):
        self.images, self.labels, self.test_images, self.test_labels = self.read()
        self.val_indices = self.held_out()
        is_held_out = torch.isin(torch.arange(len(self.labels)), self.val_indices)
        self.train_indices = (~is_held_out).nonzero().flatten()

    def train_dataloader(self):
        return self.train_batches(self.images, self.labels, self.train_indices)

    def val_dataloader(self):
        return self.batches(self.images, self.labels, self.val_indices)

    def test_dataloader(self):
        return self.batches(self.test_images, self.test_labels)

    def test_samples(self):
        self.setup("test")
        return self.test_images, self.test_labels

    def class_counts(self):
        return self.labels[self.train_indices].bincount(minlength=3)

    def identity(self):
        return {"images": len(self.labels)}


class Images(Dataset):
    """Images that are read one by one."""

    def __init__(self, images, labels, transform=None):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        return (self.transform(image) if self.transform else image), self.labels[index]


def flipped(image):
    """Flip half of the images, and shift their pixels, at random."""
    image = image.roll(int(torch.randint(8, ())), -1)
    return image.flip(-1) if torch.rand(()) < 0.5 else image


class InFiles(InMemory):
    """The same images in a Dataset, with a random transform in training."""

    def exact(self, images, labels, indices, transform=None):
        return ExactDataLoader(
            Images(images, labels, transform),
            self.batch_size,
            shuffle=transform is not None,
            indices=indices,
            seed=self.seed,
            trainer=self.trainer,
            preprocessing=self.preprocessing,
        )

    def train_dataloader(self):
        return self.exact(self.images, self.labels, self.train_indices, flipped)

    def val_dataloader(self):
        return self.exact(self.images, self.labels, self.val_indices)

    def test_dataloader(self):
        return self.exact(self.test_images, self.test_labels, torch.arange(NUM_TEST))


class InPlainLoaders(InMemory):
    """The same images in PyTorch's DataLoader. All parts can be divided by 2 and 3."""

    def plain(self, images, labels, indices, **options):
        raw = Subset(Images(images, labels), indices.tolist())
        return DataLoader(raw, self.batch_size, collate_fn=self.collate, **options)

    def collate(self, samples):
        images, labels = map(torch.stack, zip(*samples, strict=True))
        return self.preprocessing(images), labels

    def train_dataloader(self):
        trainer = self.trainer
        sampler = DistributedSampler(
            range(len(self.train_indices)), trainer.world_size, trainer.global_rank, seed=self.seed
        )
        return self.plain(self.images, self.labels, self.train_indices, sampler=sampler)

    def val_dataloader(self):
        return self.plain(self.images, self.labels, self.val_indices)

    def test_dataloader(self):
        return self.plain(self.test_images, self.test_labels, torch.arange(NUM_TEST))


def experiment(data):
    defaults = {"data.batch_size": 16, "model.network": "mlp", "trainer.max_epochs": 1}
    return Experiment(Classifier, data, "images", defaults)


def experiments_of(module):
    """Return an experiment for each data module of a module, by the name `OF_` and its class."""
    return {
        f"OF_{name}": experiment(found)
        for name, found in vars(sys.modules[module]).items()
        if isinstance(found, type) and issubclass(found, DataModule) and found.__module__ == module
    }


MEMORY, FILES, PLAIN = map(experiment, (InMemory, InFiles, InPlainLoaders))
