"""The outcome of a run, and the differences between the outcomes of two runs."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bn_lightning.training import checkpoints

# Entries of result.json that differ between equal runs.
MEASURED = ("images_per_second", "train_seconds", "resumed_at_steps", "commit", "processes")
# Entries of last.ckpt that are equal in equal runs.
COMPARED = (
    *("state_dict", "current_model_state", "averaging_state", "precise_statistics"),
    *("optimizer_states", "lr_schedulers", "global_step"),
)


def read(folder: Path) -> dict[str, Any]:
    """Return what a run has left in its folder, without durations.

    Raises:
        UserError: a checkpoint cannot be loaded.
        OSError: last.ckpt or result.json is missing.
    """
    _, last = checkpoints.load(str(folder / "checkpoints" / "last.ckpt"))
    found = {name: last[name] for name in COMPARED if name in last}
    best = folder / "checkpoints" / "best.ckpt"
    if best.exists():
        found["best.ckpt"] = checkpoints.load(str(best))[1]["state_dict"]
    logged = last.get("between_steps", {}).get("callback_metrics", {})
    found["logged"] = {
        name: value for name, value in logged.items() if not name.endswith("_per_second")
    }
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    found["result"] = {name: value for name, value in result.items() if name not in MEASURED}
    return found


def differences(
    one: Any, other: Any, relative: float = 0.0, absolute: float = 0.0, where: str = ""
) -> list[str]:
    """Return the differences between two nested outcomes, in words.

    Args:
        relative: the allowed difference of two numbers or tensors, relative to the
            largest value.
        absolute: the allowed difference in addition.
        where: the name of the outcome, if it is not nested.
    """
    return list(_differences(one, other, relative, absolute, where))


def _differences(
    one: Any, other: Any, relative: float, absolute: float, where: str
) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            place = f"{where} {key}".strip()
            if key not in one or key not in other:
                yield f"{place} is missing in one of them"
            else:
                yield from _differences(one[key], other[key], relative, absolute, place)
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            yield f"{where} has {len(one)} entries in one and {len(other)} in the other"
            return
        for index, pair in enumerate(zip(one, other, strict=True)):
            yield from _differences(*pair, relative, absolute, f"{where} {index}")
    elif isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            yield f"{where} is {_kind(one)} in one and {_kind(other)} in the other"
        else:
            yield from _of_tensors(one, other, relative, absolute, where)
    elif isinstance(one, float) and isinstance(other, float):
        is_close = math.isclose(one, other, rel_tol=relative, abs_tol=absolute)
        if not is_close and not (math.isnan(one) and math.isnan(other)):
            yield f"{where} is {one:.6g} in one and {other:.6g} in the other"
    elif one != other:
        yield f"{where} is {str(one)[:40]} in one and {str(other)[:40]} in the other"


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _of_tensors(
    one: Tensor, other: Tensor, relative: float, absolute: float, where: str
) -> Iterator[str]:
    # Not-a-number is equal to itself here.
    if torch.equal(one, other) or torch.equal(one.nan_to_num(), other.nan_to_num()):
        return
    precise = one.double(), other.double()
    largest = float((precise[0] - precise[1]).abs().max())
    scale = float(precise[0].abs().max())
    if math.isnan(largest) or largest > relative * scale + absolute:
        yield f"{where} differs by up to {largest:.2g} (its largest value is {scale:.2g})"
