"""What a checkpoint holds, read without executing anything in it."""

from typing import Any

import fsspec
import torch

from bn_lightning.errors import UserError


def load(path: str) -> tuple[str, dict[str, Any]]:
    """Load a checkpoint, from a file or an address, without executing anything in it.

    Returns:
        The path of the file, downloaded where an address was given, and what it holds.

    Raises:
        UserError: no such file, or not a checkpoint of this project.
    """
    try:
        local = fsspec.open_local(f"simplecache::{path}") if "://" in path else path
        checkpoint = torch.load(local, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"There is no checkpoint {path!r}. A run keeps its own in runs/NAME/N/checkpoints/") from None
    except Exception as error:  # torch.load has no exception of its own, and what it raises hangs on the file's bytes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{path!r} is not a checkpoint that can be loaded safely, and nothing in it was executed.\n    {reason}\n"
            "Give a file that fit wrote: runs/NAME/N/checkpoints/last.ckpt"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"{path!r} holds no run: it has no 'state_dict'. Give a file that fit wrote.")
    return str(local), checkpoint


def settings(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The settings in a checkpoint, as defaults for the parser."""
    data = dict(checkpoint.get("datamodule_hyper_parameters", {}))
    for name in ("root", "mirrors"):  # of the machine that trained, and no checkpoint's to choose
        data.pop(name, None)
    defaults = {"seed_everything": data.pop("seed")} if "seed" in data else {}
    defaults |= {f"data.{name}": value for name, value in data.items()}
    return defaults | {f"model.{name}": value for name, value in checkpoint.get("hyper_parameters", {}).items()}
