"""Replacement of the normalization layers of any network, in place."""

import inspect
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _LazyNormBase, _NormBase
from torch.nn.utils import parametrize

from bn_lightning import terminal
from bn_lightning.errors import UserError
from bn_lightning.norms import recognition, registry, transfer
from bn_lightning.norms.modes import in_eval_mode

# BatchNorm1d and InstanceNorm1d accept two numbers of dimensions.
NUM_DIMS: dict[type[nn.Module], int] = {
    nn.BatchNorm2d: 4,
    nn.BatchNorm3d: 5,
    nn.InstanceNorm2d: 4,
    nn.InstanceNorm3d: 5,
}
# The names of layers in a fused layer, in the order in which they follow the norm.
FUSED = ("drop", "act")


@dataclass(frozen=True)
class Replacement:
    """One row of the report of `replace_norms`.

    Attributes:
        layer: name of the layer in the network.
        old: its class before.
        new: its class now; None if it was left.
        reason: why it was left.
    """

    layer: str
    old: str
    new: str | None
    reason: str = ""


class Report(list[Replacement]):
    """What `replace_norms` did with each norm layer of a network. `print` shows a table."""

    def __str__(self) -> str:
        rows = [[row.layer, row.old, row.new or f"left: {row.reason}"] for row in self]
        return terminal.table(("layer", "class", "new class"), rows)


class NormAct(nn.Sequential):
    """A norm followed by the dropout and the activation of a fused layer that it replaces.

    timm's `BatchNormAct2d` is such a layer. It is a batch norm with the attributes
    `drop` and `act`.
    """


def replace_norms(
    network: nn.Module,
    norm: str | Callable[..., nn.Module],
    norm_args: dict[str, Any] | None = None,
    example: Tensor | None = None,
) -> Report:
    """Replace the normalization layers of a network by another norm, in place.

    Batch, instance and group normalization are replaced, and every other layer that
    keeps running statistics of the channels in dimension 1. Layers that normalize the
    last dimensions, such as LayerNorm, are left.

    Parameters and buffers that both layers have, with the same name and shape, are the
    same tensors afterwards, so an existing optimizer continues to train them. eps and
    momentum are kept unless `norm_args` contains them. Device, dtype, mode and hooks are
    kept too. A new layer remembers the one that it replaces, and the norm `builtin`
    restores it.

    Args:
        norm: a name in the registry, an import path, or a class or function that is
            called as `norm(num_features=..., num_dims=..., **norm_args)`. `builtin`
            leaves PyTorch's own layers.
        norm_args: further arguments of the norm.
        example: an input of the network, to find the number of dimensions of the input
            of each layer. Without it, `num_dims` is None for layers whose class does
            not determine it, such as BatchNorm1d.

    Returns:
        A row for each norm layer: its name, its old class, its new class, or the reason
        why it was left.

    Raises:
        UserError: the network has no norm layer that can be replaced, or is a norm
            itself; or the norm does not accept an argument, or needs `num_dims`, which
            is unknown without an example. The network is then unchanged.
    """
    if _is_norm(network):
        raise UserError(
            f"The network is a norm layer, {type(network).__name__}. replace_norms replaces the "
            "layers inside a network. Use torch.nn.Sequential(layer)."
        )
    restores = norm == "builtin"
    name = norm if isinstance(norm, str) else getattr(norm, "__name__", repr(norm))
    make = registry.find(norm) if isinstance(norm, str) else norm
    found = _norm_layers(network)
    shapes = {} if example is None else _input_shapes(network, found.values(), example)

    reference = next(network.parameters(), None)
    new_layers: dict[nn.Module, nn.Module] = {}
    report = Report()
    for layer_name, old in found.items():
        reason = _reason_to_leave(old, shapes.get(old), restores)
        if not reason and old not in new_layers:
            try:
                shape = shapes.get(old)
                new = _new_layer(old, make, name, norm_args or {}, shape, reference)
            except UserError as error:
                raise UserError(f"Layer {layer_name}, a {type(old).__name__}: {error}") from error
            new_layers[old] = new
        new_class = None if reason else type(new_layers[old]).__name__
        report.append(Replacement(layer_name, type(old).__name__, new_class, reason))
    if not found or (not new_layers and not restores):
        reasons = Counter((row.old, row.reason) for row in report)
        raise UserError(
            f"{type(network).__name__} has no norm layer that can be replaced."
            + "".join(f"\n{count} {old}: {reason}" for (old, reason), count in reasons.items())
        )

    # Nothing fails from here on.
    for layer_name, old in found.items():
        if old in new_layers:
            parent, _, child = layer_name.rpartition(".")
            setattr(network.get_submodule(parent), child, new_layers[old])
    return report


def _norm_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Return the norm layers of a network by name. A layer that is used twice has two names."""
    found: dict[str, nn.Module] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        is_inside = any(name.startswith(f"{outer}.") for outer in found)
        if not is_inside and _is_norm(module):
            found[name] = module
    return found


def _is_norm(module: nn.Module) -> bool:
    known = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    if isinstance(module, known) or hasattr(module, "_replaced"):
        return True
    # The mean and deviation of the data are constants, and not running statistics.
    learns = any(True for _ in module.parameters(recurse=False))
    return any(
        word in name and (learns or "running" in name or "moving" in name)
        for name, _ in module.named_buffers(recurse=False)
        for word in recognition.STATISTICS
    )


def _input_shapes(
    network: nn.Module, layers: Iterable[nn.Module], example: Tensor
) -> dict[nn.Module, torch.Size]:
    """Return the shape of the input of each layer, from one forward pass in eval mode."""
    shapes: dict[nn.Module, torch.Size] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shapes[layer] = inputs[0].shape

    handles = [layer.register_forward_pre_hook(note) for layer in {*layers}]
    try:
        with in_eval_mode(network), torch.no_grad():
            network(example)
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def can_replace(network: nn.Module) -> bool:
    """Return whether `replace_norms` would replace a layer of a network."""
    layers = _norm_layers(network).values()
    return not all(_reason_to_leave(layer, None, restores=False) for layer in layers)


def _reason_to_leave(old: nn.Module, shape: torch.Size | None, restores: bool) -> str:
    """Return why a layer is not replaced, or an empty string."""
    was_replaced = hasattr(old, "_replaced")
    if isinstance(old, nn.LayerNorm | nn.RMSNorm) and not was_replaced:
        return "it normalizes the last dimensions"
    if isinstance(old, _LazyNormBase) and old.has_uninitialized_params():
        return "its size is unknown before the first forward pass"
    if parametrize.is_parametrized(old):
        return "its parameters are parametrized"
    if "weight" in dict(old.named_buffers(recurse=False)) and not was_replaced:
        return "its scale is a buffer, so it is frozen"
    inner = [name for name, _ in old.named_children()]
    if not isinstance(old, NormAct) and not {*inner} <= {*FUSED}:
        return f"it contains other layers: {', '.join(inner)}"
    if shape is not None and (len(shape) < 2 or shape[1] != _num_features(old)):
        return f"it does not normalize dimension 1 of its input {tuple(shape)}"
    if restores and isinstance(old, _NormBase | nn.GroupNorm) and not was_replaced:
        return "it is PyTorch's own"
    return ""


def _new_layer(
    old: nn.Module,
    make: Callable[..., nn.Module],
    name: str,
    norm_args: dict[str, Any],
    shape: torch.Size | None,
    reference: Tensor | None,
) -> nn.Module:
    """Return the layer that replaces an old one, with the values of the old one.

    Its device and dtype are those of `reference` if the old layer has no tensors.
    """
    fused = [getattr(old, child) for child in FUSED if hasattr(old, child)]
    norm, *fused = old.children() if isinstance(old, NormAct) else (old, *fused)
    # A tuple is not a submodule, so the state dict does not contain the old layer.
    replaced: tuple[nn.Module] = getattr(old, "_replaced", (old,))
    [original] = replaced
    if name == "builtin" and original is not old:
        transfer.values(norm, original, reference)
        transfer.hooks(old, original)
        return original

    by_class = (dims for kind, dims in NUM_DIMS.items() if isinstance(norm, kind))
    num_dims = next(by_class, getattr(norm, "num_dims", None))
    num_dims = len(shape) if shape is not None else num_dims
    if num_dims is None and _needs_num_dims(make):
        raise UserError(
            f"The norm {name!r} needs the number of dimensions of the input, which the class does "
            "not determine. Pass an input of the network: replace_norms(..., example=inputs)."
        )
    arguments = transfer.arguments(norm, make) | norm_args
    # The norm may draw random numbers. Other weights must not depend on them.
    with torch.random.fork_rng(devices=()):
        new = registry.build(make, name, _num_features(old), num_dims, arguments)
    transfer.values(norm, new, reference)
    new = NormAct(new, *fused) if fused else new
    transfer.hooks(old, new)
    new.__dict__["_replaced"] = replaced
    return new


def _num_features(layer: nn.Module) -> int:
    # LayerNorm and Identity do not have the number of channels as an attribute.
    replaced: tuple[nn.Module] = getattr(layer, "_replaced", (layer,))
    [layer] = replaced
    for name in ("num_features", "num_channels"):
        if isinstance(getattr(layer, name, None), int):
            return int(getattr(layer, name))
    tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    return max(tensor.numel() for tensor in tensors)


def _needs_num_dims(make: Callable[..., nn.Module]) -> bool:
    parameter = inspect.signature(make).parameters.get("num_dims")
    return parameter is not None and parameter.default is not None
