"""The first batches of any training loader, without a trace in the loader."""

import copy
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader


def first_batches(loader: Any, num_batches: int, seed: int) -> Iterator[Any]:
    """Yield the first batches of an epoch, which are the same in each call.

    Seed the global generators before. Generators of the loader and its samplers are
    seeded here, and restored at the end. Other state of a dataset or sampler is not
    restored.
    """
    # The copy starts workers of its own. Persistent ones belong to the training.
    loader = copy.copy(loader)
    if isinstance(loader, DataLoader):
        loader._iterator = None
    states = [(generator, generator.get_state()) for generator in _generators(loader)]
    try:
        for generator, _ in states:
            generator.manual_seed(seed)
        yield from islice(loader, num_batches)
    finally:
        for generator, state in states:
            generator.set_state(state)


def _generators(loader: Any) -> list[torch.Generator]:
    """Return the generators of a DataLoader and its samplers, each once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = getattr(loader, "sampler", None), getattr(batch_sampler, "sampler", None)
    found = [getattr(part, "generator", None) for part in (loader, batch_sampler, *samplers)]
    return list({id(it): it for it in found if isinstance(it, torch.Generator)}.values())
