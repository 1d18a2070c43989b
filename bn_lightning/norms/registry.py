"""The choice of a normalization layer, by name or by import path."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from bn_lightning import lookup
from bn_lightning.errors import UserError
from bn_lightning.norms import article, torch_norms
from bn_lightning.norms.layer import BatchNorm
from bn_lightning.norms.renorm import BatchRenorm

NORMS: dict[str, Callable[..., nn.Module]] = {
    "custom": BatchNorm,
    "builtin": torch_norms.builtin,
    "article": article.BatchNorm,
    "renorm": BatchRenorm,
    "group": torch_norms.group,
    "none": torch_norms.none,
}


def make(
    name: str, num_features: int, num_dims: int, norm_args: dict[str, Any] | None = None
) -> nn.Module:
    """Build the norm of that name for `num_features` channels of input with `num_dims` dimensions.

    `num_dims` is 2 or 4. The norm is always called by keyword: `nn.BatchNorm2d(6, 4)` would take
    the 4 for eps.

    Raises:
        UserError: an unknown name, or arguments that the norm does not take.
    """
    norm, norm_args = find(name), norm_args or {}
    shape = {"num_features": num_features, "num_dims": num_dims}
    if norm_args.keys() & shape.keys() or not _accepts(norm, shape | norm_args):
        raise UserError(
            f"The norm {name!r} does not take norm_args {norm_args}. "
            f"Its arguments are {inspect.signature(norm)}."
        )
    layer = norm(**shape, **norm_args)
    if not isinstance(layer, nn.Module):
        raise UserError(
            f"The norm {name!r} gave a {type(layer).__name__}; it must give a torch.nn.Module."
        )
    return layer


def find(name: str) -> Callable[..., nn.Module]:
    """Return a norm of `NORMS`, or a class or function by its import path, `package.module.Name`.

    Raises:
        UserError: an unknown name, or something that cannot be called as
            `norm(num_features=..., num_dims=...)`.
    """
    norm = lookup.find(name, "norm", NORMS)
    if not callable(norm) or not _accepts(norm, {"num_features": 6, "num_dims": 4}):
        raise UserError(_adapter_advice(name, norm))
    # An import path can name anything. `make` checks what is built.
    return norm  # type: ignore[no-any-return]


def _accepts(norm: Callable[..., Any], arguments: dict[str, Any]) -> bool:
    try:
        inspect.signature(norm).bind(**arguments)
    except (TypeError, ValueError):  # ValueError: an extension type without a signature
        return False
    return True


def _adapter_advice(name: str, norm: Any) -> str:
    try:
        takes = f"it is {norm.__name__}{inspect.signature(norm)}"
    except (TypeError, ValueError, AttributeError):
        takes = f"it is a {type(norm).__name__}"
    return (
        f"The norm {name!r} cannot be called as norm(num_features=..., num_dims=...): {takes}.\n"
        "Wrap it in a function of yours, say in my_norms.py, and name that: "
        "--model.norm my_norms.group_norm\n\n"
        "    from torch import nn\n\n"
        "    def group_norm(num_features, num_dims, num_groups=2):\n"
        "        return nn.GroupNorm(num_groups, num_features)\n"
    )
