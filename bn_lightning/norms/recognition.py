"""Normalization layers in any network, and what they declare about themselves.

A layer is recognized by the parameters and buffers that it keeps, not by its class. It may declare
two things by class attributes; without them the answer is no:

* `prefers_channels_last`: on a CPU the layer is faster if its input is in channels-last order.
* `only_writes_running_stats`: in training the layer writes its running statistics and never reads
  them, so that several processes have to agree on them in evaluation only. Of torch's `_BatchNorm`
  classes this is known.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.loss import _Loss

STATISTICS = ("mean", "var", "std")  # one of these is in the name of each running statistic
# Their weights may be of such sizes too, where there is one input or one output.
NO_NORMS = (nn.Linear, _ConvNd, nn.Embedding, nn.EmbeddingBag, _Loss, nn.PReLU)


def is_by_channel(kept: Iterable[Tensor]) -> bool:
    """Whether these are what a norm keeps: numbers for each channel, learned or counted, and no matrix."""
    sizes = [(value.numel(), max(value.shape, default=1)) for value in kept]
    return bool(sizes) and all(size == longest for size, longest in sizes)


def by_channel(kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a norm keeps for each channel, (C,), by the paper's names: gamma, beta, running_mean, running_var.

    A layer without one of them, or with one of its own that no name tells, has fewer; a deviation is squared.
    """
    channels = max((value.numel() for value in kept.values()), default=0)
    found: dict[str, Tensor] = {}
    for name, value in kept.items():
        values = value.detach().flatten().float()
        if len(values) < channels or not value.is_floating_point():  # a count of batches
            continue
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
    """The normalization layers of a network, by name, whatever their class: told by what they keep.

    A norm that keeps nothing is not found.
    """

    def is_norm(module: nn.Module) -> bool:
        is_leaf = not any(True for _ in module.children())
        kept = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        return is_leaf and is_by_channel(kept) and not isinstance(module, NO_NORMS)

    return {name: module for name, module in network.named_modules() if is_norm(module)}


def with_statistics(network: nn.Module) -> dict[str, Any]:
    """The layers of a network that keep running statistics, by name, whatever their class: told by their buffers."""
    return {
        name: module
        for name, module in network.named_modules()
        if any(
            word in buffer
            for buffer, _ in module.named_buffers(recurse=False)
            for word in STATISTICS
        )
    }


def prefers_channels_last(network: nn.Module) -> bool:
    """Return whether every norm layer of a network declares that it prefers channels-last order.

    A network without a norm layer prefers it too, as convolutions on a CPU do.
    """
    norms = [*layers(network).values(), *_torch_norms(network)]
    return all(getattr(norm, "prefers_channels_last", False) for norm in norms)


def _torch_norms(network: nn.Module) -> list[nn.Module]:
    """Return torch's norm layers, which `layers` does not find if they keep nothing."""
    classes = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    return [module for module in network.modules() if isinstance(module, classes)]


def only_writes_running_stats(network: nn.Module) -> bool:
    """Return whether no layer of a network reads its running statistics in training."""
    return all(
        getattr(layer, "only_writes_running_stats", isinstance(layer, _BatchNorm))
        for layer in with_statistics(network).values()
    )
