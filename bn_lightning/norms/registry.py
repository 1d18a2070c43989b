"""The choice of a normalization layer, by name or by import path."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from bn_lightning.errors import UserError
from bn_lightning.norms import article
from bn_lightning.norms.layer import BatchNorm
from bn_lightning.norms.renorm import BatchRenorm


def builtin(
    num_features: int,
    num_dims: int,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
    track_running_stats: bool = True,
) -> nn.Module:
    """torch's own layer: BatchNorm1d behind a linear layer, BatchNorm2d behind a convolution."""
    layer = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d}[num_dims]
    return layer(num_features, eps, momentum, affine, track_running_stats)


def group(num_features: int, num_dims: int, num_groups: int = 2, eps: float = 1e-5, affine: bool = True) -> nn.Module:
    """torch's GroupNorm, which normalizes each image by itself, in training as in eval mode.

    Wu and He, "Group Normalization", 2018, https://arxiv.org/abs/1803.08494.

    Raises:
        UserError: channels that cannot be split into `num_groups` of the same size; or, behind a linear layer, groups
            of one channel: a value normalized by itself is always 0.
    """
    most = num_features if num_dims == 4 else num_features - 1
    allowed = [groups for groups in range(1, most + 1) if num_features % groups == 0]
    if num_groups not in allowed:
        raise UserError(
            f"num_groups is {num_groups}; for a layer of {num_features} channels it must be one of "
            f"{', '.join(map(str, allowed))}: --model.norm_args.num_groups 2"
        )
    return nn.GroupNorm(num_groups, num_features, eps, affine)


def none(num_features: int, num_dims: int) -> nn.Module:
    """No normalization."""
    return nn.Identity()


NORMS: dict[str, Callable[..., nn.Module]] = {
    "custom": BatchNorm,
    "builtin": builtin,
    "article": article.BatchNorm,
    "renorm": BatchRenorm,
    "group": group,
    "none": none,
}


def find(name: str) -> Callable[..., nn.Module]:
    """The norm of that name: one of `NORMS`, or a class or function by its import path, `package.module.Name`.

    Raises:
        UserError: no such name, or something that cannot be called as `norm(num_features=..., num_dims=...)`.
    """
    if not isinstance(name, str):  # a checkpoint keeps names, and no code
        given = f"{getattr(name, '__module__', '?')}.{getattr(name, '__qualname__', '?')}"
        raise UserError(f"A norm is given by its name, as text: norm={given!r}")
    if name in NORMS:
        return NORMS[name]
    module_name, _, attribute = name.rpartition(".")
    if not module_name:
        raise UserError(f"There is no norm {name!r}. There are {', '.join(NORMS)}, or an import path: my_norms.MyNorm")
    try:
        norm = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"The norm {name!r} cannot be imported: {error}.\n"
            f"It is read as the name {attribute!r} in the module {module_name!r}, looked for in the current folder and "
            f"among the installed packages. The norms that need no import are {', '.join(NORMS)}."
        ) from error
    if not callable(norm) or not _accepts(norm, {"num_features": 6, "num_dims": 4}):
        raise UserError(_adapter_advice(name, norm))
    return norm  # type: ignore[no-any-return]  # an import path can name anything; `make` checks what it builds


def make(name: str, num_features: int, num_dims: int, norm_args: dict[str, Any] | None = None) -> nn.Module:
    """Build the norm of that name for `num_features` channels of input with `num_dims` (2 or 4) dimensions.

    Always called by keyword: `nn.BatchNorm2d(6, 4)` would take the 4 for eps.

    Raises:
        UserError: an unknown name, or arguments that the norm does not take.
    """
    norm, norm_args = find(name), norm_args or {}
    shape = {"num_features": num_features, "num_dims": num_dims}
    if norm_args.keys() & shape.keys() or not _accepts(norm, shape | norm_args):
        raise UserError(
            f"The norm {name!r} does not take norm_args {norm_args}. Its arguments are {inspect.signature(norm)}."
        )
    layer = norm(**shape, **norm_args)
    if not isinstance(layer, nn.Module):
        raise UserError(f"The norm {name!r} gave a {type(layer).__name__}; it must give a torch.nn.Module.")
    return layer


def _accepts(norm: Callable[..., Any], arguments: dict[str, Any]) -> bool:
    try:
        inspect.signature(norm).bind(**arguments)
    except (TypeError, ValueError):  # ValueError: something built in, which shows no signature
        return False
    return True


def _adapter_advice(name: str, norm: Any) -> str:
    try:
        takes = f"it is {norm.__name__}{inspect.signature(norm)}"
    except (TypeError, ValueError, AttributeError):
        takes = f"it is a {type(norm).__name__}"
    return (
        f"The norm {name!r} cannot be called as norm(num_features=..., num_dims=...): {takes}.\n"
        "Wrap it in a function of yours, say in my_norms.py, and name that: --model.norm my_norms.group_norm\n\n"
        "    from torch import nn\n\n"
        "    def group_norm(num_features, num_dims, num_groups=2):\n"
        "        return nn.GroupNorm(num_groups, num_features)\n"
    )
