"""Random generators that objects keep, instead of using the global ones."""

import random
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

GENERATORS = (np.random.Generator, np.random.RandomState, random.Random, torch.Generator)
# How deep an object is searched.
DEPTH = 4


def kind_of(generator: Any) -> str:
    """Return the library and the class of a generator, such as `numpy.Generator`."""
    return f"{type(generator).__module__.partition('.')[0]}.{type(generator).__name__}"


def generators_in(value: Any, depth: int = DEPTH, path: str = "") -> list[str]:
    """Return the random generators that an object, its attributes or its module keep, in words."""
    if isinstance(value, GENERATORS):
        return [f"`{path}`, a {kind_of(value)}"]
    if isinstance(value, list | tuple) and len(value) <= 20:
        return [found for part in value for found in generators_in(part, depth - 1, path)]
    is_data = isinstance(value, Tensor | np.ndarray | type)
    if depth <= 0 or is_data or not hasattr(value, "__dict__"):
        return []
    owner = type(value)
    found = []
    is_library = owner.__module__.partition(".")[0] in ("torch", "torchvision", "bn_lightning")
    if hasattr(owner, "__getitem__") and not is_library:
        found += [
            f"`{name}` of {owner.__module__}, a {kind_of(kept)}"
            for name, kept in vars(sys.modules[owner.__module__]).items()
            if isinstance(kept, GENERATORS)
        ]
    for name, kept in vars(value).items():
        found += generators_in(kept, depth - 1, f"{owner.__name__}.{name}")
    return found
