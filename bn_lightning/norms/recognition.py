"""Recognition of normalization layers in any network, and of their properties.

A norm layer is recognized by its parameters and buffers, not by its class. A layer may
declare three class attributes. An absent attribute counts as False:

* `prefers_channels_last`: on a CPU, the layer is faster if its input is in
  channels-last order.
* `only_writes_running_stats`: in training, the layer writes its running statistics but
  never reads them. With several processes, these statistics are then synchronized only
  before evaluation. For PyTorch's `_BatchNorm` classes, the default is True.
* `has_fixed_statistics`: the layer never writes its running statistics. They are then
  neither synchronized between processes nor recomputed for averaged weights.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.loss import _Loss

# A buffer is a running statistic if its name contains one of these words.
STATISTICS = ("mean", "var", "std")
# These modules are not norms, although their parameters can have the shapes of a norm's
# parameters, for example those of a linear layer with one output.
NO_NORMS = (nn.Linear, _ConvNd, nn.Embedding, nn.EmbeddingBag, _Loss, nn.PReLU)


def are_channel_values(tensors: Iterable[Tensor]) -> bool:
    """Return whether the tensors of a module have the shapes of a norm's tensors.

    There must be at least one tensor, and each must be a scalar or a vector. A vector
    may have further dimensions of size 1, such as (1, C, 1, 1).
    """
    sizes = [(tensor.numel(), max(tensor.shape, default=1)) for tensor in tensors]
    return bool(sizes) and all(size == longest for size, longest in sizes)


def channel_values(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters and running statistics of a norm layer by standard names.

    The names are gamma, beta, running_mean and running_var. Names that the layer does
    not have are left out. A running standard deviation is converted to a variance.

    Args:
        tensors: the layer's parameters and buffers, by name.

    Returns:
        One float32 value per channel, (C,), for each name.
    """
    channels = max((tensor.numel() for tensor in tensors.values()), default=0)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        # This skips a counter such as num_batches_tracked.
        if tensor.numel() < channels or not tensor.is_floating_point():
            continue
        values = tensor.detach().flatten().float()
        if "mean" in name:
            found["running_mean"] = values
        elif "var" in name:
            found["running_var"] = values
        elif "std" in name:
            found["running_var"] = values.square()
        elif any(word in name for word in ("bias", "beta", "shift")):
            found["beta"] = values
        else:
            found["gamma"] = values
    return found


def layers(network: nn.Module) -> dict[str, nn.Module]:
    """Return the normalization layers of a network, by name.

    They are recognized by their parameters and buffers. A norm without parameters and
    buffers is not found.
    """

    def is_norm(module: nn.Module) -> bool:
        is_leaf = not any(True for _ in module.children())
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        return is_leaf and are_channel_values(tensors) and not isinstance(module, NO_NORMS)

    return {name: module for name, module in network.named_modules() if is_norm(module)}


def has_fixed_statistics(layer: nn.Module) -> bool:
    """Return whether a layer never writes its running statistics.

    It declares this, or its scale is a buffer, as in torchvision's FrozenBatchNorm2d.
    """
    has_fixed_scale = "weight" in dict(layer.named_buffers(recurse=False))
    return has_fixed_scale or getattr(layer, "has_fixed_statistics", False)


def with_statistics(network: nn.Module) -> dict[str, Any]:
    """Return the layers of a network that have running statistics, by name.

    They are recognized by the names of their buffers. Layers with fixed statistics are
    left out.
    """
    return {
        name: module
        for name, module in network.named_modules()
        if not has_fixed_statistics(module)
        and any(
            word in buffer
            for buffer, _ in module.named_buffers(recurse=False)
            for word in STATISTICS
        )
    }


def prefers_channels_last(network: nn.Module) -> bool:
    """Return whether every norm layer of a network declares `prefers_channels_last`.

    Return True for a network without norm layers, because convolutions on a CPU are
    faster with channels-last input.
    """
    norms = [*layers(network).values(), *_torch_norms(network)]
    return all(getattr(norm, "prefers_channels_last", False) for norm in norms)


def _torch_norms(network: nn.Module) -> list[nn.Module]:
    """Return PyTorch's norm layers, including those without parameters and buffers."""
    classes = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    return [module for module in network.modules() if isinstance(module, classes)]


def only_writes_running_stats(network: nn.Module) -> bool:
    """Return whether no layer of a network reads its running statistics in training.

    A layer counts as reading them unless it declares `only_writes_running_stats`.
    """
    return all(
        getattr(layer, "only_writes_running_stats", isinstance(layer, _BatchNorm))
        for layer in with_statistics(network).values()
    )
