"""Data modules whose loaders repeat, leave out, reorder or change samples."""

import copy
import time

import numpy as np
import torch
from torch.utils.data import DataLoader, RandomSampler

from bn_lightning import ExactDataLoader
from bn_lightning.training.batches import TensorBatches
from tests.testing.data_modules import (
    NUM_TEST,
    Images,
    InFiles,
    InMemory,
    InPlainLoaders,
    experiments_of,
    flipped,
)

# Each sample once


class DropsLastOfTest(InPlainLoaders):
    def test_dataloader(self):
        indices = torch.arange(NUM_TEST)
        return self.plain(self.test_images, self.test_labels, indices, drop_last=True)


class DrawsWithRepeats(InPlainLoaders):
    def train_dataloader(self):
        sampler = _Repeating(len(self.train_indices))
        return self.plain(self.images, self.labels, self.train_indices, sampler=sampler)


class _Repeating(torch.utils.data.Sampler):
    """A sampler that draws an index for each sample, instead of a permutation."""

    def __init__(self, count):
        self.count, self.epoch = count, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.count

    def __iter__(self):
        random = np.random.default_rng(self.epoch)
        return iter(random.integers(self.count, size=self.count).tolist())


class FillsLastBatch(InPlainLoaders):
    """The 35 validation samples cannot be divided by two processes."""

    def val_dataloader(self):
        return self.plain(self.images, self.labels, self.val_indices[:35])


class PartOfPart(InMemory):
    def setup(self, stage):
        super().setup(stage)
        if self.trainer:
            rank, count = self.trainer.global_rank, self.trainer.world_size
            self.train_indices = self.train_indices[rank::count]

    def class_counts(self):
        return None


class AllRanksReadAll(InFiles):
    def val_dataloader(self):
        raw = Images(self.images, self.labels)
        loader = ExactDataLoader(
            raw, self.batch_size, indices=self.val_indices, preprocessing=self.preprocessing
        )
        assert loader.world_size == 1
        return loader


# Order and augmentation


class _OwnGenerator:
    def __init__(self):
        self.rng = np.random.default_rng(0)

    def __call__(self, image):
        return image.roll(int(self.rng.integers(1, 8)), -1)


class GeneratorInTransform(InFiles):
    def train_dataloader(self):
        return self.exact(self.images, self.labels, self.train_indices, _OwnGenerator())


RANDOM = np.random.default_rng(0)


class _AtImport(Images):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image.roll(int(RANDOM.integers(8)), -1), label


class GeneratorAtImport(InFiles):
    def train_dataloader(self):
        loader = super().train_dataloader()
        loader.dataset = _AtImport(self.images, self.labels)
        return loader


class WorkerSeeds(InPlainLoaders):
    """NumPy's global generator in the workers of a plain DataLoader."""

    def collate(self, samples):
        images, labels = super().collate(samples)
        if self.trainer.training:
            images = images.roll(int(np.random.randint(1, 8)), -1)
        return images, labels


class PlainShuffle(InPlainLoaders):
    def train_dataloader(self):
        return self.plain(self.images, self.labels, self.train_indices, shuffle=True)


class DrawsInTurn(InMemory):
    """The n-th sample of an epoch gets the n-th number, whichever it is."""

    def augmentation(self, epoch):
        random = np.random.default_rng((self.seed, epoch))

        def augment(images, indices):
            shifts = random.integers(8, size=len(images))
            return torch.stack([i.roll(int(s), -1) for i, s in zip(images, shifts, strict=True)])

        return augment


class DrawsFromClock(InMemory):
    def augmentation(self, epoch):
        random = np.random.default_rng(time.time_ns())

        def brightened(images, indices):
            values = random.integers(0, 50, (len(images), 1, 1), np.uint8)
            return images + torch.from_numpy(values)

        return brightened


class SameOrder(InPlainLoaders):
    def train_dataloader(self):
        return self.plain(self.images, self.labels, self.train_indices)


# Evaluation


class ShuffledValidation(InPlainLoaders):
    def val_dataloader(self):
        return self.plain(self.images, self.labels, self.val_indices, shuffle=True)


class AugmentedValidation(InPlainLoaders):
    def val_dataloader(self):
        raw = Images(self.images, self.labels, flipped)
        return DataLoader(
            torch.utils.data.Subset(raw, self.val_indices.tolist()),
            self.batch_size,
            collate_fn=self.collate,
        )


class _Shuffling(TensorBatches):
    def __iter__(self):
        order = self.current_epoch().order
        shuffled = self.targets.clone()
        shuffled[order.sort().values] = self.targets[order]
        loader = copy.copy(self)
        loader.__class__, loader.targets = TensorBatches, shuffled
        return iter(loader)


class TargetsShuffled(InMemory):
    """Inputs and targets are shuffled by two permutations."""

    def train_dataloader(self):
        loader = super().train_dataloader()
        loader.__class__ = _Shuffling
        return loader


class OversampledClasses(InPlainLoaders):
    """Not a mistake: the sampler draws with replacement, so the test of the order is skipped."""

    def train_dataloader(self):
        sampler = RandomSampler(range(len(self.train_indices)), replacement=True)
        return self.plain(self.images, self.labels, self.train_indices, sampler=sampler)


globals().update(experiments_of(__name__))
