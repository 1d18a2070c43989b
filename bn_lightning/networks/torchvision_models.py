"""Classification networks of torchvision, for any number of channels and classes."""

import inspect
from typing import Any

import torch
import torchvision
from torch import nn

from bn_lightning import lookup
from bn_lightning.errors import UserError


def build(
    name: str,
    in_channels: int,
    image_size: tuple[int, int],
    num_classes: int,
    weights: str | None = None,
    small_stem: bool = False,
    **arguments: Any,
) -> nn.Module:
    """Build a network of `torchvision.models` with its own norm layers.

    If `in_channels` is not 3, the first convolution is replaced by one with torch's
    default initialization. Pretrained weights of that convolution are summed over its
    input channels.

    Args:
        name: `torchvision.NAME`, for example `torchvision.resnet18`.
        weights: pretrained weights, `DEFAULT` or a name such as `IMAGENET1K_V1`, which
            torchvision downloads. The last layer is then new.
        small_stem: start a ResNet with a 3x3 convolution of stride 1 and without
            pooling, for small images.
        arguments: other arguments of the network.

    Raises:
        UserError: the name is unknown, an argument is not accepted, or the network
            returns several outputs in training.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    short = name.partition(".")[2]
    if short not in known:
        names = ", ".join(lookup.similar(short, known)) or "resnet18, mobilenet_v3_small, vgg11_bn"
        raise UserError(
            f"torchvision has no classification network {short!r}. Similar names: {names}. All: "
            "https://docs.pytorch.org/vision/stable/models.html#classification"
        )
    if short.startswith("vit_"):
        # A vision transformer is built for one size of square images.
        arguments = {"image_size": max(image_size), **arguments}
    if short in ("googlenet", "inception_v3"):
        # The default value is the same, but torchvision warns about it.
        arguments = {"init_weights": True, **arguments}
    builder = torchvision.models.get_model_builder(short)
    # With pretrained weights, the number of classes is that of the weights.
    classes = {} if weights else {"num_classes": num_classes}
    try:
        network: nn.Module = builder(weights=weights, **classes, **arguments)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"The network {name!r} cannot be built with {arguments | {'weights': weights}}: {error}"
        ) from error
    except OSError as error:
        raise UserError(
            f"The weights {weights!r} of {name!r} cannot be downloaded: {error}\n"
            f"They are stored in {torch.hub.get_dir()}/checkpoints, so another machine can provide "
            "the file."
        ) from error
    if getattr(network, "aux_logits", False):
        raise UserError(
            f"The network {name!r} returns several outputs in training, because it has auxiliary "
            "classifiers. Turn them off: --model.network_args.aux_logits false"
        )
    if isinstance(network, torchvision.models.GoogLeNet | torchvision.models.Inception3):
        # With pretrained weights, these two rescale their input. A checkpoint is loaded
        # without pretrained weights, and must give the same outputs.
        network.transform_input = False
    if weights:
        _replace_last_layer(network, num_classes)
    if small_stem:
        _make_stem_small(name, network)
    _set_in_channels(network, in_channels, is_pretrained=weights is not None)
    return network


def _set_in_channels(network: nn.Module, in_channels: int, is_pretrained: bool) -> None:
    """Give the first convolution another number of input channels."""
    path, first = next((n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d))
    if first.in_channels == in_channels:
        return
    new = _like(first, in_channels=in_channels)
    if is_pretrained:
        with torch.no_grad():
            new.weight.copy_(first.weight.sum(1, keepdim=True) / in_channels)
            if first.bias is not None and new.bias is not None:
                new.bias.copy_(first.bias)
    _set(network, path, new)


def _make_stem_small(name: str, network: nn.Module) -> None:
    if not isinstance(network, torchvision.models.ResNet):
        raise UserError(
            f"small_stem can be used with torchvision's ResNets only, not with {name!r}. Remove "
            "--model.network_args.small_stem."
        )
    network.conv1 = _like(network.conv1, kernel_size=3, stride=1, padding=1)
    network.maxpool = nn.Identity()


def _replace_last_layer(network: nn.Module, num_classes: int) -> None:
    layers = ((n, m) for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d))
    *_, (path, last) = layers
    if isinstance(last, nn.Conv2d):
        _set(network, path, _like(last, out_channels=num_classes))
    else:
        _set(network, path, nn.Linear(last.in_features, num_classes, last.bias is not None))


def _like(convolution: nn.Conv2d, **changed: Any) -> nn.Conv2d:
    """Return a new convolution with the arguments of another one, except those given."""
    names = inspect.signature(nn.Conv2d).parameters.keys() - {"bias", "device", "dtype"}
    arguments = {name: getattr(convolution, name) for name in names}
    return nn.Conv2d(**arguments | changed, bias=convolution.bias is not None)


def _set(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, module)
