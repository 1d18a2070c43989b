"""Stratified split of training and validation samples."""

import torch
from torch import Tensor

from bn_lightning.training import seeds


def stratified_split(labels: Tensor, num_held_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return ascending indices of training and held-out samples, with equal class proportions."""
    shuffled = torch.from_numpy(seeds.for_split(seed).permutation(len(labels)))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    # Evenly spaced positions in the samples sorted by class take the same fraction of
    # each class.
    positions = (torch.arange(num_held_out) * len(labels)) // max(num_held_out, 1)
    is_held_out = torch.zeros(len(labels), dtype=torch.bool)
    is_held_out[by_class[positions]] = True
    return (~is_held_out).nonzero().flatten(), is_held_out.nonzero().flatten()
