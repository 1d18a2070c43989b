"""Running statistics that do not lag: the statistics of given batches, for any network.

Running statistics are moving averages. They lag behind weights that change fast. Wu and
Johnson, "Rethinking 'Batch' in BatchNorm", 2021, https://arxiv.org/abs/2105.07576,
section 3, estimate the statistics of the population anew at fixed weights. They call
this PreciseBN, and average the statistics of batches. Here, the sums of all batches are
merged (Chan, Golub and LeVeque, 1979), so that mean and variance are those of all values.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from bn_lightning import generators
from bn_lightning.errors import UserError
from bn_lightning.norms import modes, recognition
from bn_lightning.norms.batch_statistics import merge
from bn_lightning.norms.definition import at_least_float32, per_channel, values_per_channel
from bn_lightning.norms.names import names_of


@dataclass(frozen=True)
class Report:
    """What `estimate_statistics` did.

    Attributes:
        estimated: names of the layers whose running statistics were set.
        left: names of the other layers with running statistics, each with the reason.
    """

    estimated: list[str]
    left: dict[str, str]

    def __str__(self) -> str:
        if not self.estimated and not self.left:
            return "the network has no layer with running statistics: nothing is estimated"
        lines = [f"running statistics of {len(self.estimated)} layer(s) are estimated"]
        return "\n".join(
            lines + [f"  left: {name or 'the network'}: {why}" for name, why in self.left.items()]
        )


def estimate_statistics(network: nn.Module, batches: Iterable[Any]) -> Report:
    """Set the running statistics of a network to those of given batches, at fixed weights.

    The running mean and the running variance (unbiased) of a layer become the statistics
    of all values that reach it in all batches together, per channel. With several
    processes, these are the batches of all of them, and each process must call this
    function. If layers synchronize their statistics, each process must have the same
    number of batches. Some of these may be empty.

    There is one pass over the batches. In it, the estimated layers normalize by the
    statistics of each batch, as in training. All other layers are in eval mode and run
    without gradients. At the end, everything else in the network and the global random
    generators are as before. After an exception, the statistics are as before too.

    A layer is estimated if it has buffers `running_mean` and `running_var` of its C
    channels, in dimension 1 of its input, or is a norm of this project. These are left:

    * layers with fixed statistics, such as `FrozenBatchNorm`;
    * if the network is in training mode, layers in eval mode;
    * instance norms, whose running statistics are averages over samples;
    * layers that TorchScript has compiled;
    * layers with running statistics of other names.

    Args:
        network: the network, in any mode. It is called as `network(input)`.
        batches: inputs, or tuples whose first element is the input. Tensors are moved to
            the device of the network.

    Raises:
        UserError: there are no batches.
    """
    # Tensors that are created in inference mode cannot be changed outside of it.
    with torch.inference_mode(False), torch.no_grad():
        return _estimate(network, batches)


def _estimate(network: nn.Module, batches: Iterable[Any]) -> Report:
    layers, left = _layers(network)
    if not layers:
        return Report([], left)
    device = next(chain(network.buffers(), network.parameters())).device
    moments = {name: _Moments(layer, device) for name, layer in layers.items()}
    with generators.unchanged(device), _observed(network, layers, moments):
        num_batches = _run(network, batches, device)
    is_distributed = dist.is_available() and dist.is_initialized()
    if is_distributed:
        total = torch.tensor(num_batches, device=device)
        dist.all_reduce(total)
        num_batches = int(total)
    if not num_batches:
        raise UserError(
            "There are no batches. estimate_statistics needs at least one batch of inputs."
        )
    found = {
        name: it.over_all_processes() if is_distributed else it.values()
        for name, it in moments.items()
    }
    for name, (mean, squares, count) in found.items():
        if count < 2:
            kind = type(layers[name]).__name__
            left[name] = f"{kind}, fewer than 2 values reach its channels in dimension 1"
        else:
            _set(layers[name], mean, squares / (count - 1))
    return Report([name for name in layers if name not in left], left)


def plan(network: nn.Module) -> Report:
    """Return which layers `estimate_statistics` would set, and which it would leave."""
    layers, left = _layers(network)
    return Report([*layers], left)


def statistics(network: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that `estimate_statistics` sets, by their names in the state dict."""
    layers, _ = _layers(network)
    estimated = {*layers.values()}
    # A layer that is used twice has two names in the state dict.
    return {
        f"{name}.{buffer}".lstrip("."): getattr(layer, buffer)
        for name, layer in network.named_modules(remove_duplicate=False)
        if layer in estimated
        for buffer in (names_of(layer).mean, names_of(layer).var)
    }


def _layers(network: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the layers to estimate by name, and the reasons why others are left."""
    layers: dict[str, nn.Module] = {}
    left: dict[str, str] = {}
    others = recognition.with_statistics(network)
    for name, layer in network.named_modules():
        names, buffers = names_of(layer), dict(layer.named_buffers(recurse=False))
        reason = ""
        if names.mean not in buffers or names.var not in buffers:
            if name not in others:
                continue
            reason = f"it has no buffers {names.mean} and {names.var}"
        elif recognition.has_fixed_statistics(layer):
            reason = "its statistics are fixed"
        elif network.training and not layer.training:
            reason = "it is in eval mode, and the network in training mode"
        elif isinstance(layer, _InstanceNorm):
            reason = "its running statistics are averages over samples"
        elif isinstance(layer, torch.jit.ScriptModule):
            reason = "it is compiled by TorchScript, which runs no hooks"
        if reason:
            left[name] = f"{type(layer).__name__}, {reason}"
        else:
            layers[name] = layer
    return layers, left


class _Moments:
    """Mean and sum of squared deviations of the values in each channel, (C,)."""

    def __init__(self, layer: nn.Module, device: torch.device) -> None:
        channels = getattr(layer, names_of(layer).mean).numel()
        # Mps has no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.mean = torch.zeros(channels, dtype=dtype, device=device)
        self.squares = torch.zeros_like(self.mean)
        self.count = 0

    def add(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Merge the input of a layer into the moments; a forward pre-hook."""
        x = next(chain(args, kwargs.values()), None)
        if not isinstance(x, Tensor) or x.dim() < 2 or x.size(1) != len(self.mean):
            return
        count = values_per_channel(x)
        if not count:
            return
        x = at_least_float32(x.detach())
        all_but_channels = [d for d in range(x.dim()) if d != 1]
        mean = x.mean(all_but_channels)
        squares = (x - per_channel(mean, x)).square().sum(all_but_channels)
        # Chan's formula for two parts.
        total = self.count + count
        difference = mean - self.mean
        self.mean += difference * (count / total)
        self.squares += squares + difference.square() * (self.count * count / total)
        self.count = total

    def values(self) -> tuple[Tensor, Tensor, int]:
        return self.mean, self.squares, self.count

    def over_all_processes(self) -> tuple[Tensor, Tensor, Tensor]:
        return merge(self.mean, self.squares, self.count, dist.group.WORLD)


@contextmanager
def _observed(
    network: nn.Module, layers: dict[str, nn.Module], moments: dict[str, _Moments]
) -> Iterator[None]:
    """Add the inputs of the layers to their moments, until the network is restored at the end.

    The layers normalize by the statistics of each batch. All others are in eval mode.
    """
    with (
        modes.in_eval_mode(network),
        # torch.compile would compile the hooks too.
        torch.compiler.set_stance("force_eager"),
        _restored(layers.values()),
        ExitStack() as hooks,
    ):
        for name, layer in layers.items():
            layer.training = True
            # The mode of some layers follows the gradient mode, for example that of
            # `article`. The other layers run without gradients, which is their eval mode.
            vars(layer)["forward"] = torch.enable_grad()(layer.forward)
            vars(layer).update(names_of(layer).plain)
            handle = layer.register_forward_pre_hook(moments[name].add, with_kwargs=True)
            hooks.callback(handle.remove)
        yield


def _run(network: nn.Module, batches: Iterable[Any], device: torch.device) -> int:
    """Call the network on each batch, and return the number of batches."""
    num_batches = 0
    for batch in batches:
        inputs = batch[0] if isinstance(batch, tuple | list) else batch
        if isinstance(inputs, Tensor):
            inputs = inputs.to(device)
            # Autograd does not accept a tensor that was created in inference mode.
            inputs = inputs.clone() if inputs.is_inference() else inputs
        network(inputs)
        num_batches += 1
    return num_batches


@contextmanager
def _restored(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Restore attributes and buffers of layers at the end."""
    saved = [
        (
            layer,
            dict(vars(layer)),
            dict(layer._buffers),
            [(buffer, buffer.clone()) for buffer in layer.buffers(recurse=False)],
        )
        for layer in layers
    ]
    try:
        yield
    finally:
        for layer, attributes, buffers, values in saved:
            for new in vars(layer).keys() - attributes.keys():
                del vars(layer)[new]
            vars(layer).update(attributes)
            # A layer may have replaced a buffer.
            layer._buffers.update(buffers)
            for buffer, before in values:
                buffer.copy_(before)


def _set(layer: Any, mean: Tensor, var: Tensor) -> None:
    names = names_of(layer)
    running_mean, running_var = getattr(layer, names.mean), getattr(layer, names.var)
    if names.var_is_std:
        var = (var + layer.eps).sqrt()
    running_mean.copy_(mean.view_as(running_mean))
    running_var.copy_(var.view_as(running_var))
