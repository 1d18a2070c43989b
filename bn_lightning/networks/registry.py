"""Networks by name or import path."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bn_lightning import lookup
from bn_lightning.errors import UserError, describe_error
from bn_lightning.networks.lenet import LeNet
from bn_lightning.networks.mlp import MLP
from bn_lightning.networks.resnet import ResNet
from bn_lightning.norms import registry as norms
from bn_lightning.norms.modes import in_eval_mode
from bn_lightning.norms.replace import can_replace, replace_norms

NETWORKS: dict[str, Callable[..., nn.Module]] = {"lenet": LeNet, "mlp": MLP, "resnet": ResNet}
TORCHVISION = "torchvision."

EXAMPLE = """\
A short example, in my_networks.py, for --model.network my_networks.TwoLayers:

    from torch import nn

    class TwoLayers(nn.Sequential):
        def __init__(self, in_channels, image_size, num_classes, norm, width=16):
            super().__init__(
                nn.Conv2d(in_channels, width, 3), norm(width, 4), nn.ReLU(),
                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes),
            )
"""


class ImageShape(NamedTuple):
    """What a network must know of the images and their classes.

    Attributes:
        in_channels: number of channels.
        image_size: height and width in pixels.
        num_classes: number of classes.
    """

    in_channels: int
    image_size: tuple[int, int]
    num_classes: int


def build(
    name: str,
    shape: ImageShape,
    norm: str,
    norm_args: dict[str, Any] | None = None,
    network_args: dict[str, Any] | None = None,
) -> nn.Module:
    """Build a network that maps images (N, C, H, W) to logits (N, num_classes).

    A network that takes no argument `norm` is built with its own norm layers, which are
    then replaced. The norm `builtin` leaves them.

    Args:
        name: a key of `NETWORKS`, `torchvision.NAME`, or an import path of a class or
            function that is called as `network(in_channels=..., image_size=(height,
            width), num_classes=..., norm=..., **network_args)`.
        norm, norm_args: see `norms.registry.make`.
        network_args: other arguments of the network.

    Raises:
        UserError: the name is unknown, the network does not accept an argument or
            returns something other than logits, its norms cannot be replaced, or it
            does not work for images of this size.
    """
    make = _find(name)
    given = shape._asdict()
    takes_norm = "norm" in inspect.signature(make).parameters
    if takes_norm:
        given["norm"] = norms.factory(norm, norm_args)
    network = _call(make, name, given, network_args or {})
    example = torch.zeros(2, shape.in_channels, *shape.image_size)
    with in_eval_mode(network), torch.no_grad(), torch.random.fork_rng(devices=()):
        _check_output(network, name, example, shape)
    if not takes_norm and norm != "builtin" and (norm != "none" or can_replace(network)):
        _replace_norms(network, name, norm, norm_args, example)
    return network


def _replace_norms(
    network: nn.Module, name: str, norm: str, norm_args: dict[str, Any] | None, example: Tensor
) -> None:
    try:
        replace_norms(network, norm, norm_args, example)
    except UserError as error:
        raise UserError(
            f"The network {name!r} cannot be used with --model.norm {norm}.\n{error}\n"
            "--model.norm builtin leaves its own layers. A network of your own may take the "
            "argument `norm`, which builds a layer: norm(num_features, num_dims)."
        ) from error
    # A norm may refuse a shape that the network's own layers accept. For example,
    # instance norm needs more than one position.
    try:
        with in_eval_mode(network), torch.no_grad(), torch.random.fork_rng(devices=()):
            network(example)
    except (RuntimeError, ValueError, AssertionError) as error:
        size = "x".join(map(str, example.shape[2:]))
        raise UserError(
            f"The network {name!r} with --model.norm {norm} fails for images of {size} pixels: "
            f"{describe_error(error)}\n{_place(error)}"
            "Use another norm, or enlarge the images, for example with --data.resize 64."
        ) from error


def _find(name: str) -> Callable[..., nn.Module]:
    if not name.startswith(TORCHVISION):
        known = {**NETWORKS, "torchvision.NAME": None}
        try:
            return lookup.find(name, "network", known)  # type: ignore[no-any-return]
        except UserError as error:
            raise UserError(f"{error}\n{EXAMPLE}") from error
    # Importing torchvision takes a second, and other networks do not need it.
    from bn_lightning.networks import torchvision_models

    return partial(torchvision_models.build, name)


def _call(
    make: Callable[..., nn.Module], name: str, given: dict[str, Any], network_args: dict[str, Any]
) -> nn.Module:
    signature = inspect.signature(make)
    try:
        signature.bind_partial(**given)
    except TypeError as error:
        raise UserError(
            f"The network {name!r} must accept the arguments {', '.join(given)}: {error}.\n"
            + EXAMPLE
        ) from error
    try:
        signature.bind(**given, **network_args)
    except TypeError as error:
        advice = lookup.describe_arguments(make, network_args, passed=given)
        raise UserError(
            f"The network {name!r} does not accept network_args {network_args}: {error}.\n{advice}"
        ) from error
    network = make(**given, **network_args)
    if not isinstance(network, nn.Module):
        raise UserError(
            f"The network {name!r} is an object of type {type(network).__name__}; it must be a "
            f"torch.nn.Module.\n{EXAMPLE}"
        )
    return network


def _place(error: Exception) -> str:
    """Return the line of the user's code in which an error was raised, or "" if there is none."""
    return "".join(f"{line}\n" for line in lookup.users_lines(error)[-1:])


def _check_output(network: nn.Module, name: str, example: Tensor, shape: ImageShape) -> None:
    size = "x".join(map(str, shape.image_size))
    try:
        logits = network(example)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(
            f"The network {name!r} fails for images of {size} pixels with {shape.in_channels} "
            f"channel(s): {describe_error(error)}\n{_place(error)}"
            "If the images are too small, enlarge them, for example with --data.resize 32."
        ) from error
    expected = (len(example), shape.num_classes)
    found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if found != expected:
        raise UserError(
            f"The network {name!r} returns {found} for {len(example)} images. It must return one "
            f"logit per class, {expected}.\n{EXAMPLE}"
        )
