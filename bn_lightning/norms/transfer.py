"""Transfer of arguments, parameters, statistics and hooks from one norm layer to another."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.norms import torch_norms
from bn_lightning.norms.layer import BatchNorm
from bn_lightning.norms.names import NAMES, Names, names_of

ROLES = ("weight", "bias", "mean", "var")
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def arguments(old: nn.Module, make: Callable[..., nn.Module]) -> dict[str, Any]:
    """Return the arguments for `make` that are taken over from the old layer."""
    names = NAMES.get(make, Names())
    found: dict[str, Any] = {}
    if hasattr(old, "eps"):
        found["eps"] = old.eps
    momentum = getattr(old, "momentum", None)
    if isinstance(momentum, int | float):
        converts = names_of(old).momentum_is_of_old != names.momentum_is_of_old
        found["momentum"] = 1 - momentum if converts else momentum
    if isinstance(old, _BatchNorm | BatchNorm):
        if momentum is None and make not in NAMES:
            # The running statistics are the mean over all batches.
            found["momentum"] = None
        found["affine"] = old.weight is not None
        found["bias"] = old.bias is not None or old.weight is None
        # With running statistics, instance norm would be batch norm in eval mode.
        if make is not torch_norms.instance:
            found["track_running_stats"] = old.track_running_stats
    accepted = inspect.signature(make).parameters
    return {name: value for name, value in found.items() if name in accepted}


def values(old: nn.Module, new: nn.Module, reference: Tensor | None) -> None:
    """Transfer parameters, buffers, device, dtype and mode.

    A tensor that has the same name and shape in both layers is shared. If the name, the
    shape or the kind of statistic differs, or only one of the two is a parameter, the
    values are copied.
    """
    new.train(old.training)
    given, eps = _tensors(old), getattr(old, "eps", 0.0)
    reference = next((t for t in given.values() if t.is_floating_point()), reference)
    if reference is not None:
        new.to(reference.device, reference.dtype)
    source, target = names_of(old), names_of(new)
    roles = {getattr(target, role): getattr(source, role) for role in ROLES}
    for name, value in _tensors(new).items():
        old_name = roles.get(name, name)
        old_value = given.get(old_name)
        if old_value is None or old_value.numel() != value.numel():
            continue
        # gamma and beta are buffers in a frozen norm. Shared, they would be learned.
        are_parameters = [isinstance(tensor, nn.Parameter) for tensor in (value, old_value)]
        is_same_kind = are_parameters[0] == are_parameters[1]
        if name == old_name and value.shape == old_value.shape and is_same_kind:
            setattr(new, name, old_value)
            continue
        was_std = source.var_is_std and name == target.var
        is_std = target.var_is_std and name == target.var
        with torch.no_grad():
            # A value that was converted before is not rounded again.
            if not torch.equal(_convert(value, is_std, was_std, eps).view_as(old_value), old_value):
                value.copy_(_convert(old_value, was_std, is_std, eps).view_as(value))
        if is_same_kind:
            value.requires_grad_(old_value.requires_grad)


def hooks(old: nn.Module, new: nn.Module) -> None:
    """Share the hooks of a layer. The handle of a hook still removes it."""
    for name in HOOKS:
        new.__dict__[name] = old.__dict__[name]


def _tensors(layer: nn.Module) -> dict[str, Tensor]:
    tensors = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
    return dict(tensors)


def _convert(value: Tensor, is_std: bool, to_std: bool, eps: float) -> Tensor:
    """Convert a variance to sqrt(variance + eps), or back, if the two differ."""
    if is_std == to_std:
        return value
    return (value + eps).sqrt() if to_std else (value.square() - eps).clamp(min=0)
