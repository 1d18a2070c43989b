"""The content of a checkpoint from anyone, checked and as plain data of limited size.

Loading a checkpoint executes no code in it. But its values can have other types than
those that `fit` writes, can contain themselves, and can be far larger than the file.
"""

from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any, NoReturn

import torch
from torch import Tensor

from bn_lightning.errors import UserError
from bn_lightning.runs import records
from bn_lightning.training import checkpoints
from bn_lightning.training.data_module import IDENTITY

# Values and characters, after values to which several places refer were repeated.
MAX_SIZE = 4_000_000
MAX_DEPTH = 32

# The types of what `inspect` reads, outermost first.
STRUCTURE = {
    "global_step": int,
    "hyper_parameters": dict,
    "datamodule_hyper_parameters": dict,
    IDENTITY: dict,
    "between_steps": dict,
    "between_steps.surroundings": dict,
    "callbacks": dict,
    "callbacks.Records": dict,
    "callbacks.Records.epochs": list,
    "callbacks.Records.validations": list,
}


def load(path: str) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """Load a checkpoint from a file or a URL.

    Returns:
        The local file, the tensors of the network by name, as evaluation uses them, and
        the rest of the content as plain data.

    Raises:
        UserError: the file does not exist, cannot be loaded safely, or does not have the
            structure of a checkpoint that `fit` has written.
    """
    local, checkpoint = checkpoints.load(path, limited=True)
    tensors = checkpoints.weights_to_evaluate(checkpoint)
    for name in ("state_dict", checkpoints.PRECISE_STATISTICS):
        checkpoint.pop(name, None)
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.is_nested:
            kind = "nested Tensor" if isinstance(value, Tensor) else type(value).__name__
            raise UserError(
                f"{path!r} does not contain a network: {short_repr(name)} in its 'state_dict' has "
                f"the type {kind}, not Tensor."
            )
    content = plain(checkpoint, path)
    _refuse_other_structure(content, path)
    return Path(local), tensors, content


def is_stored(tensor: Tensor) -> bool:
    """Return whether the file has a number for each element, so that they can be listed.

    A tensor of one number can be expanded to any shape. Quantized and sparse tensors
    store their elements in other ways, and tensors on the device `meta` have none.
    """
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def plain(value: Any, path: str) -> Any:
    """Return a copy of a value that consists of None, bool, int, float, str, dict, list and tuple.

    Other objects, integers of more than 64 bits, and whatever is nested too deeply are
    replaced by a description such as `<Tensor>`.

    Raises:
        UserError: the copy would be too large.
    """
    left = MAX_SIZE

    def copy(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1 + (len(value) if isinstance(value, str) else 0)
        if left < 0:
            raise UserError(
                f"{path!r} cannot be shown: its settings and metrics have more than {MAX_SIZE:,} "
                "values and characters."
            )
        if value is None or isinstance(value, bool | float):
            return value
        if isinstance(value, str):
            return str(value)
        if isinstance(value, int):
            bits = value.bit_length()
            return value if bits < 64 else f"<integer of {bits:,} bits>"
        if isinstance(value, dict | list | tuple) and depth < MAX_DEPTH:
            if isinstance(value, dict):
                return {str(copy(k, depth + 1)): copy(v, depth + 1) for k, v in value.items()}
            inner = [copy(item, depth + 1) for item in value]
            return inner if isinstance(value, list) else tuple(inner)
        return f"<{type(value).__name__}>"

    return copy(value, 0)


def _refuse_other_structure(content: Mapping[str, Any], path: str) -> None:
    def refuse(reason: str) -> NoReturn:
        raise UserError(
            f"{path!r} is not a checkpoint of a run: {reason}. Use a checkpoint that fit has "
            "written."
        )

    for name, kind in STRUCTURE.items():
        *sections, key = name.split(".")
        section = content
        for part in sections:
            section = section.get(part, {})
        if key in section and not isinstance(section[key], kind):
            refuse(f"{name!r} has the type {type(section[key]).__name__}, not {kind.__name__}")
    recorded = records.recorded_in(dict(content))
    for name, required in (("epochs", ()), ("validations", ("step",))):
        for metrics in recorded.get(name, []):
            is_complete = isinstance(metrics, dict) and all(key in metrics for key in required)
            if not is_complete or not all(isinstance(v, int | float) for v in metrics.values()):
                refuse(f"'callbacks.Records.{name}' has an entry that is not a dict of numbers")
