"""What may change the rounding of a run besides settings: versions, device, processes, threads."""

import functools
from importlib.metadata import version
from typing import Any

import lightning.pytorch as pl
import torch

# Each look reads a file, and every checkpoint needs it.
_version = functools.cache(version)


def of(trainer: pl.Trainer) -> dict[str, Any]:
    """Return what may change the rounding of a run without being a setting."""
    versions = {name: _version(name) for name in ("torch", "lightning")}
    threads = torch.get_num_threads() * trainer.world_size
    device = trainer.strategy.root_device.type
    return {**versions, "device": device, "processes": trainer.world_size, "threads": threads}


def report_differences(trainer: pl.Trainer, before: dict[str, Any]) -> None:
    """Print what is different from before: the run is then the same up to rounding only."""
    now = of(trainer)
    changed = [
        f"{name} {now[name]}, before {before.get(name)}"
        for name in now
        if now[name] != before.get(name)
    ]
    if changed and trainer.is_global_zero:
        what = "; ".join(changed)
        print(f"resuming with {what}: the same run up to rounding, not to the bit", flush=True)
