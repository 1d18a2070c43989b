"""Data modules that declare something wrong, or split the data in a wrong way."""

import time

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import random_split

from tests.testing.data_modules import NUM_VAL, InFiles, InMemory, experiments_of

# Declarations


class WrongImageSize(InMemory):
    image_size = (8, 10)


class LabelsFromOne(InMemory):
    def read(self):
        images, labels, test_images, test_labels = super().read()
        return images, labels + 1, test_images, test_labels + 1

    def class_counts(self):
        return None


class FloatLabels(InMemory):
    def read(self):
        images, labels, test_images, test_labels = super().read()
        return images, labels.float(), test_images, test_labels.float()

    def class_counts(self):
        return None


class NoClassNames(InMemory):
    classes = None


class BlankTestImage(InMemory):
    """Each image is standardized by itself, and one of them has a single value."""

    def __init__(self, **loading):
        super().__init__(**loading)
        self.preprocessing = Standardized()

    def read(self):
        images, labels, test_images, test_labels = super().read()
        test_images[17] = 0
        return images, labels, test_images, test_labels


class Standardized(torch.nn.Module):
    def forward(self, images):
        pixels = images.float().reshape(-1, 1, 8, 8)
        return (pixels - pixels.mean((2, 3), True)) / pixels.std((2, 3), keepdim=True)


class CountsOfAll(InMemory):
    def class_counts(self):
        return self.labels.bincount(minlength=3)


class IdentityWithTime(InMemory):
    def identity(self):
        return {"read": time.time_ns()}


# Preprocessing


class PreprocessedTwice(InFiles):
    def exact(self, images, labels, indices, transform=None):
        images = self.preprocessing(images).squeeze(1)
        return super().exact(images, labels, indices, transform)


class PreprocessingOfTraining(InMemory):
    """The mean of the training images is subtracted, after setup("fit") only."""

    def setup(self, stage):
        super().setup(stage)
        if stage == "fit":
            self.preprocessing.register_buffer("mean", self.images.float().mean())
            self.preprocessing.forward = lambda images: (
                (images.float() - self.preprocessing.mean).reshape(-1, 1, 8, 8) / 255
            )


# The split


class LeakedIndices(InMemory):
    def setup(self, stage):
        super().setup(stage)
        self.train_indices = torch.arange(len(self.labels))


class LeakedCopies(InMemory):
    """The data function appends some images to fill a class, before the split."""

    def read(self):
        images, labels, *test = super().read()
        return torch.cat([images, images[:60]]), torch.cat([labels, labels[:60]]), *test


class BlackImages(InMemory):
    def read(self):
        images, labels, test_images, test_labels = super().read()
        return torch.zeros_like(images), labels, torch.zeros_like(test_images), test_labels


class LeakedTestAfterResize(InMemory):
    """Some images of the test are in the training folder, in the larger original size."""

    def read(self):
        images, labels, test_images, test_labels = super().read()
        images, test_images = (
            F.interpolate(part[:, None], scale_factor=2) for part in (images, test_images)
        )
        images[:5] = test_images[10:15]
        parts = [F.interpolate(part, (8, 8))[:, 0] for part in (images, test_images)]
        return parts[0], labels, parts[1], test_labels


class SplitByTime(InMemory):
    def held_out(self):
        order = np.random.default_rng(time.time_ns()).permutation(len(self.labels))
        return torch.from_numpy(order[:NUM_VAL])

    def class_counts(self):
        return None


class SplitByRank(InMemory):
    def held_out(self):
        rank = self.trainer.global_rank if self.trainer else 0
        order = np.random.default_rng(rank).permutation(len(self.labels))
        return torch.from_numpy(order[:NUM_VAL])


class UnseededSplit(InMemory):
    def held_out(self):
        count = len(self.labels)
        return torch.tensor(random_split(range(count), [NUM_VAL, count - NUM_VAL])[0].indices)

    def class_counts(self):
        return None


globals().update(experiments_of(__name__))
