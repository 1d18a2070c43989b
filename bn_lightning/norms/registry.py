"""Normalization layers by name or import path."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bn_lightning import lookup
from bn_lightning.errors import UserError
from bn_lightning.norms import article, torch_norms
from bn_lightning.norms.frozen import FrozenBatchNorm
from bn_lightning.norms.ghost import GhostBatchNorm
from bn_lightning.norms.layer import BatchNorm
from bn_lightning.norms.renorm import BatchRenorm
from bn_lightning.norms.rms import rms

# Called as norm(num_features, num_dims).
NormFactory = Callable[[int, int], nn.Module]

NORMS: dict[str, Callable[..., nn.Module]] = {
    "custom": BatchNorm,
    "builtin": torch_norms.builtin,
    "article": article.BatchNorm,
    "renorm": BatchRenorm,
    "ghost": GhostBatchNorm,
    "frozen": FrozenBatchNorm,
    "group": torch_norms.group,
    "layer": torch_norms.layer,
    "instance": torch_norms.instance,
    "rms": rms,
    "none": torch_norms.none,
}


def make(
    name: str, num_features: int, num_dims: int, norm_args: dict[str, Any] | None = None
) -> nn.Module:
    """Build a norm layer.

    Args:
        name: a key of `NORMS`, or an import path, `package.module.Name`.
        num_features: the number of channels.
        num_dims: the number of dimensions of the input, from 2 to 5: 2 after a linear
            layer, and 3, 4 or 5 after a 1-, 2- or 3-dimensional convolution.
        norm_args: further arguments of the norm.

    Raises:
        UserError: the name is unknown, the norm does not accept the arguments, or it
            cannot be built for this number of channels or dimensions.
    """
    return build(find(name), name, num_features, num_dims, norm_args)


def build(
    norm: Callable[..., nn.Module],
    name: str,
    num_features: int,
    num_dims: int | None,
    norm_args: dict[str, Any] | None = None,
) -> nn.Module:
    """Build a norm layer, like `make`, from its class or function.

    Args:
        name: the name of the norm for error messages.
        num_dims: as in `make`; None if it is unknown.
    """
    norm_args = norm_args or {}
    # The norm is called by keyword. `nn.BatchNorm2d(6, 4)` would use the 4 as eps.
    shape = {"num_features": num_features, "num_dims": num_dims}
    if norm_args.keys() & shape.keys() or not _accepts(norm, shape | norm_args):
        raise UserError(
            f"The norm {name!r} does not accept norm_args {norm_args}.\n"
            + lookup.describe_arguments(norm, norm_args, passed=shape)
        )
    layer = norm(**shape, **norm_args)
    if not isinstance(layer, nn.Module):
        raise UserError(
            f"The norm {name!r} returned an object of type {type(layer).__name__}.\n"
            "A norm must return a torch.nn.Module."
        )
    return layer


def factory(norm: str | NormFactory, norm_args: dict[str, Any] | None = None) -> NormFactory:
    """Return a function `norm(num_features, num_dims)` that builds a layer, for a network.

    Args:
        norm: a name or an import path, as in `make`, or a class. A function is returned
            unchanged.
    """
    if not isinstance(norm, str | type):
        return norm
    # A class is called by keyword: `BatchNorm(6, 4)` would use the 4 as eps.
    if isinstance(norm, str):
        found, name = find(norm), norm
    else:
        found, name = norm, norm.__name__
        refuse_other_calls(found, name)

    def build_norm(num_features: int, num_dims: int) -> nn.Module:
        # The norm may draw random numbers. The other weights must not depend on them.
        with torch.random.fork_rng(devices=()):
            return build(found, name, num_features, num_dims, norm_args)

    return build_norm


def find(name: str) -> Callable[..., nn.Module]:
    """Return the class or function of a norm.

    Args:
        name: a key of `NORMS`, or an import path, `package.module.Name`.

    Raises:
        UserError: the name is unknown, or the object cannot be called as
            `norm(num_features=..., num_dims=...)`.
    """
    norm = lookup.find(name, "norm", NORMS)
    refuse_other_calls(norm, name)
    # An import path may point to any callable. `make` checks the type of its result.
    return norm  # type: ignore[no-any-return]


def refuse_other_calls(norm: Any, name: str) -> None:
    """Raise a UserError if `norm` cannot be called as `norm(num_features=..., num_dims=...)`."""
    if not callable(norm) or not _accepts(norm, {"num_features": 6, "num_dims": 4}):
        raise UserError(_wrapper_advice(name, norm))


def note_on_momentum(name: str, norm_args: dict[str, Any] | None) -> str | None:
    """Return a remark if the momentum seems to follow the convention of another norm."""
    momentum = (norm_args or {}).get("momentum")
    is_known = name in ("custom", "builtin", "article", "renorm", "ghost")
    if not is_known or not isinstance(momentum, int | float):
        return None
    weighs_old = name == "article"
    weight_of_batch = 1 - momentum if weighs_old else momentum
    if weight_of_batch == 0:
        return (
            f"momentum {momentum}: the running statistics keep their initial values, so eval mode "
            "does not normalize"
        )
    if weight_of_batch <= 0.5:
        return None
    other = f"{1 - momentum:.4g}"
    if weighs_old:
        return (
            f"momentum {momentum} is the weight of the old running statistics, as in the article. "
            f"A weight of {momentum} of the newest batch is --model.norm_args.momentum {other}"
        )
    return (
        f"momentum {momentum} is the weight of the newest batch in the running statistics, as in "
        f"PyTorch. The article's momentum {momentum} is --model.norm_args.momentum {other}"
    )


def _accepts(norm: Callable[..., Any], arguments: dict[str, Any]) -> bool:
    try:
        inspect.signature(norm).bind(**arguments)
    # An extension type without a signature raises a ValueError.
    except (TypeError, ValueError):
        return False
    return True


def _parameters(norm: Callable[..., Any]) -> str:
    signature = inspect.signature(norm)
    return str(signature.replace(return_annotation=inspect.Signature.empty))


def _wrapper_advice(name: str, norm: Any) -> str:
    try:
        description = f"It is {norm.__name__}{_parameters(norm)}."
    except (TypeError, ValueError, AttributeError):
        description = f"It is an object of type {type(norm).__name__}."
    return (
        f"The norm {name!r} cannot be called as norm(num_features=..., num_dims=...).\n"
        f"{description}\n"
        "Wrap it in a function, for example in my_norms.py, and use the name of the function: "
        "my_norms.group_norm\n\n"
        "    from torch import nn\n\n"
        "    def group_norm(num_features, num_dims, num_groups=2):\n"
        "        return nn.GroupNorm(num_groups, num_features)\n"
    )
