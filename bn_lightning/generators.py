"""The global random generators: those of torch, NumPy and Python."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def unchanged(device: torch.device | None = None) -> Iterator[None]:
    """Restore all global generators on the CPU, and torch's on a device, at the end.

    Lightning's `isolate_rng` does not restore them after an exception.
    """
    devices = [] if device is None or device.type == "cpu" else [device]
    kind = devices[0].type if devices else "cuda"
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices, device_type=kind):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
