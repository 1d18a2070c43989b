"""Conditions outside the settings that affect rounding: versions, device, processes, threads."""

import functools
from importlib.metadata import version
from typing import Any

import lightning.pytorch as pl
import torch

from bn_lightning import terminal

# Cached, because each lookup reads a file and every checkpoint contains the versions.
_version = functools.cache(version)


def of(trainer: pl.Trainer) -> dict[str, Any]:
    """Return the conditions that affect the rounding of a run, as plain data."""
    versions = {name: _version(name) for name in ("torch", "lightning")}
    threads = torch.get_num_threads() * trainer.world_size
    device = trainer.strategy.root_device.type
    return {**versions, "device": device, "processes": trainer.world_size, "threads": threads}


def report_differences(trainer: pl.Trainer, before: dict[str, Any]) -> None:
    """Print the conditions that differ from those of the checkpoint."""
    now = of(trainer)
    changed = [
        terminal.printable(f"{name} {now[name]} (was {before.get(name, 'unknown')})")
        for name in now
        if now[name] != before.get(name)
    ]
    if changed and trainer.is_global_zero:
        print(
            f"Resuming with {', '.join(changed)}. The resumed run is equal up to rounding, but not "
            "bit for bit.",
            flush=True,
        )
