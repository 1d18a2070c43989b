"""Initial weights from a file, for a new run."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from bn_lightning.errors import UserError
from bn_lightning.terminal import enumerated
from bn_lightning.training import checkpoints

# The number of tensors of a kind that are listed.
MAX_LISTED = 8


def load(path: str, network: nn.Module) -> list[str]:
    """Load the tensors of a file that match those of a network in name and shape.

    Args:
        path: path or URL of a checkpoint of this project, or of a plain state dict. It
            is loaded with `weights_only=True`.

    Returns:
        Lines that say how many tensors were loaded, and which were not.

    Raises:
        UserError: the file cannot be read, or no tensor matches.
    """
    given = _state_dict(path)
    own = network.state_dict()
    matching = {
        name: value
        for name, value in given.items()
        if name in own and value.shape == own[name].shape
    }
    if not matching:
        raise UserError(
            f"No tensor in {path!r} matches the network in name and shape.\n"
            f"The file: {enumerated(given, MAX_LISTED)}\nThe network: {enumerated(own, MAX_LISTED)}"
        )
    network.load_state_dict(matching, strict=False)
    lines = [f"{len(matching)} of {len(own)} tensors are from {path}"]
    other_shapes = [
        f"{name} {tuple(own[name].shape)} (file: {tuple(given[name].shape)})"
        for name in own
        if name in given and name not in matching
    ]
    for kind, names in (
        ("other shape", other_shapes),
        ("not in the file", [name for name in own if name not in given]),
        ("not in the network", [name for name in given if name not in own]),
    ):
        if names:
            lines.append(f"  {kind}: {enumerated(names, MAX_LISTED)}")
    return lines


def without(start_only: Iterable[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a model without those in `Task.start_only`."""
    found = dict(settings)
    for name in start_only:
        setting, _, key = name.partition(".")
        if not key and setting in found:
            found[setting] = None
        elif isinstance(found.get(setting), Mapping):
            found[setting] = {k: v for k, v in found[setting].items() if k != key}
    return found


def _state_dict(path: str) -> dict[str, Tensor]:
    _, content = checkpoints.read(path)
    state = content if isinstance(content, Mapping) else {}
    if isinstance(state.get("state_dict"), Mapping):
        state = checkpoints.weights_to_evaluate(state)
    tensors = {
        # In a checkpoint of a task, the network is an attribute.
        str(name).removeprefix("network."): value
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    if not tensors:
        raise UserError(
            f"{path!r} contains no tensors by name. Use a checkpoint that fit has written, or a "
            "state dict saved with torch.save(network.state_dict(), FILE)."
        )
    return tensors
