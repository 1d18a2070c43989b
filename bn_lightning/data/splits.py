"""Splits of the training samples, stratified by class, into training and validation samples."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bn_lightning.errors import UserError
from bn_lightning.training import seeds


@dataclass(frozen=True)
class Split:
    """The settings of a split.

    Args:
        val_images: number of held-out samples; None for one twelfth.
        folds, fold: number of folds, and index of the one that is held out; None for no
            cross-validation.

    Raises:
        UserError: a setting is out of range, or two exclude each other.
    """

    val_images: int | None = None
    folds: int | None = None
    fold: int | None = None

    def __post_init__(self) -> None:
        if self.val_images is not None and self.val_images < 0:
            raise UserError(
                f"val_images is {self.val_images}; it must not be negative, for example "
                "--data.val_images 5000."
            )
        if self.folds is None and self.fold is None:
            return
        if self.folds is None or self.folds < 2:
            raise UserError(
                f"folds is {self.folds}; a cross-validation has at least 2 folds, for example "
                "--data.folds 5 --data.fold 0."
            )
        if self.fold is None or not 0 <= self.fold < self.folds:
            raise UserError(
                f"fold is {self.fold}; with --data.folds {self.folds} it must be from 0 to "
                f"{self.folds - 1}. This fold is held out for validation."
            )
        if self.val_images is not None:
            raise UserError(
                "--data.val_images and --data.folds cannot be used together: the held-out fold is "
                "used for validation. Remove one of them."
            )

    def refuse_too_few(self, count: int, whole: int) -> None:
        """Raise UserError if there are too few samples; see `indices`."""
        if self.folds is not None and self.folds > count:
            raise UserError(
                f"folds is {self.folds}, but there are only {count:,} training images. Use fewer "
                "folds."
            )
        if self.folds is None and self.num_held_out(count, whole) >= count:
            raise UserError(
                f"val_images is {self.val_images}; it must be less than the number of training "
                f"images, {whole:,}."
            )

    def indices(self, labels: Tensor, whole: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return ascending indices of the training and of the held-out samples.

        Args:
            labels: int64 (N,).
            whole: number of samples to which `val_images` refers; it is scaled down if
                there are fewer.
        """
        if self.folds is not None and self.fold is not None:
            return stratified_fold(labels, self.folds, self.fold, seed)
        return stratified_split(labels, self.num_held_out(len(labels), whole), seed)

    def num_held_out(self, count: int, whole: int) -> int:
        """Return the number of held-out samples of `count`, without folds; see `indices`."""
        wanted = max(1, whole // 12) if self.val_images is None else self.val_images
        return max(1, wanted * count // whole) if wanted else 0


def stratified_split(labels: Tensor, num_held_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return ascending indices of training and held-out samples, with equal class proportions."""
    # Evenly spaced positions in the samples sorted by class take the same fraction of
    # each class.
    positions = (torch.arange(num_held_out) * len(labels)) // max(num_held_out, 1)
    return _parts(len(labels), _shuffled_by_class(labels, seed)[positions])


def stratified_fold(labels: Tensor, folds: int, fold: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return ascending indices of the samples outside and inside of a fold.

    The folds are a partition of the samples. Their sizes differ by at most one, overall
    and in each class.
    """
    return _parts(len(labels), _shuffled_by_class(labels, seed)[fold::folds])


def _shuffled_by_class(labels: Tensor, seed: int) -> Tensor:
    """Return the indices of all samples, sorted by class and shuffled within each class."""
    shuffled = torch.from_numpy(seeds.for_split(seed).permutation(len(labels)))
    return shuffled[labels[shuffled].argsort(stable=True)]


def _parts(count: int, held_out: Tensor) -> tuple[Tensor, Tensor]:
    is_held_out = torch.zeros(count, dtype=torch.bool)
    is_held_out[held_out] = True
    return (~is_held_out).nonzero().flatten(), is_held_out.nonzero().flatten()
