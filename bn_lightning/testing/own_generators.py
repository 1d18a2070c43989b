"""Random generators that objects keep, instead of using the global ones."""

import random
from typing import Any

import numpy as np
import torch

GENERATORS = (np.random.Generator, np.random.RandomState, random.Random, torch.Generator)


def kind_of(generator: Any) -> str:
    """Return the library and the class of a generator, such as `numpy.Generator`."""
    return f"{type(generator).__module__.partition('.')[0]}.{type(generator).__name__}"
