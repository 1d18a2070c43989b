"""Measurements of norm layers, activations and gradients, mostly of one monitored step."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from bn_lightning.norms import definition, recognition

# A network with more layers of a kind is monitored in part.
MAX_LAYERS = 10
PERCENTILES = (15, 50, 85)  # as in figure 1 of Ioffe and Szegedy 2015
# Percentiles and saturation of a layer are computed from about this number of values.
SAMPLE = 4_096
# An activation is saturated where its slope is at most this fraction of its steepest
# slope.
SATURATED = 0.05
EPS = 1e-5
T = TypeVar("T")
# These are not elementwise, or their slope is learned or random.
NOT_MONITORED = (
    nn.Softmax,
    nn.Softmin,
    nn.Softmax2d,
    nn.LogSoftmax,
    nn.GLU,
    nn.PReLU,
    nn.RReLU,
    nn.MultiheadAttention,
)


def selection(items: Sequence[T], size: int) -> list[T]:
    """Return at most `size` items in order, evenly spaced, with the first and the last."""
    if len(items) <= size:
        return list(items)
    step = (len(items) - 1) / (size - 1)
    return [items[round(number * step)] for number in range(size)]


class Measurements:
    """Scalars and histograms of one monitored step, by TensorBoard tag.

    A step may consist of several batches. The first forward pass is measured, before
    the step changes any parameter or running statistic.

    Args:
        max_layers: number of activations, and of layers that are no norms, that are
            measured at most; at least 2.

    Attributes:
        scalars: measurements since the last `take`.
        histograms: values of all channels (C,), if requested in `begin_step`.
        norms: names of all norm layers, as given to `begin_step`.
        activations: all activations of the step, in execution order.
        other_layers: names of all layers with a gradient that are no norms.
    """

    def __init__(self, max_layers: int = MAX_LAYERS) -> None:
        self.max_layers = max_layers
        self._steepest: dict[nn.Module, float] = {}  # steepest slope of each activation
        self.begin_step(with_histograms=False)

    def begin_step(self, with_histograms: bool, norms: Collection[str] = ()) -> None:
        """Discard the previous step.

        Args:
            with_histograms: whether to measure histograms too.
            norms: names of the norm layers of the network.
        """
        self.scalars: dict[str, float] = {}
        self.histograms: dict[str, Tensor] = {}
        self.activations: list[nn.Module] = []
        self.other_layers: list[str] = []
        self.norms = list(norms)
        self._with_histograms = with_histograms
        self._measured_norms: set[str] = set()
        self._inputs: list[tuple[nn.Module, Tensor]] = []  # of activations, in execution order
        self._squared_norms: dict[Optimizer, float] = {}  # of the gradients of its parameters

    def take(self) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Return the scalars and histograms, and clear them."""
        taken = self.scalars, self.histograms
        self.scalars, self.histograms, self._squared_norms = {}, {}, {}
        return taken

    # Norm layers

    def measure_norm(
        self, name: str, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Measure a norm layer before its forward pass; a forward pre-hook, given a name."""
        # The first call of a step updates the running statistics, so later calls are
        # ignored.
        if name in self._measured_norms:
            return
        self._measured_norms.add(name)
        tensors = [*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)]
        found = recognition.channel_values(dict(tensors))
        x = _first_tensor(args, kwargs)
        if x is not None and x.dim() > 1 and all(len(v) == x.size(1) for v in found.values()):
            mean, var = batch_statistics(x)
            found |= {"batch_mean": mean, "batch_var": var}
            if {"running_mean", "running_var"} <= found.keys():
                running_mean, running_var = found["running_mean"], found["running_var"]
                lag = running_lag(mean, var, running_mean, running_var)
                self.scalars[f"running_lag/{name}/mean"] = lag[0]
                self.scalars[f"running_lag/{name}/var"] = lag[1]
        for quantity, values in found.items():
            self.scalars[f"channel_0/{name}/{quantity}"] = float(values[0])
            if self._with_histograms:
                # The forward pass updates the running statistics in place, so this is a
                # copy.
                self.histograms[f"{quantity}/{name}"] = values.clone()

    # Activations

    def keep_activation_input(
        self, activation: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Keep a sample of the input of an activation; a forward pre-hook."""
        x = _first_tensor(args, kwargs)
        if x is not None:
            self._inputs.append((activation, sample(x)))

    def measure_activations(self) -> None:
        """Measure a selection of the inputs that were kept, numbered in execution order."""
        self.activations += [activation for activation, _ in self._inputs]
        chosen = selection([*enumerate(self._inputs, 1)], self.max_layers)
        for number, (activation, values) in chosen:
            levels = np.percentile(values.cpu().numpy(), PERCENTILES)
            for percentile, level in zip(PERCENTILES, levels, strict=True):
                self.scalars[f"activation_input/{number}/p{percentile}"] = float(level)
            if activation not in self._steepest:
                x = torch.linspace(-8, 8, 1_601, device=values.device)
                self._steepest[activation] = float(slope(activation, x).max())
            is_saturated = slope(activation, values) <= SATURATED * self._steepest[activation]
            self.scalars[f"saturated/{number}"] = float(is_saturated.float().mean())
        self._inputs = []

    # Gradients

    @property
    def has_gradients(self) -> bool:
        """Whether gradients were measured since the last `take`."""
        return bool(self._squared_norms)

    def measure_gradients(self, module: nn.Module, optimizer: Optimizer) -> None:
        """Measure the gradient norm of each layer, before the first step of an optimizer.

        In a large network, the layers are a selection of the norms and a selection of the
        others.
        """
        if optimizer in self._squared_norms:
            return
        own = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        by_layer: dict[str, list[Tensor]] = {}
        for name, layer in module.named_modules():
            of_layer = [p for p in layer.parameters(recurse=False) if p in own]
            gradients = [p.grad for p in of_layer if p.grad is not None]
            if gradients:
                # A parameter that two layers share counts for the first one only.
                own -= set(of_layer)
                by_layer[name] = gradients
        others = [name for name in by_layer if name not in self.norms]
        self.other_layers += others
        chosen = {*selection(self.norms, self.max_layers), *selection(others, self.max_layers)}
        for name in by_layer:
            if name in chosen:
                norm = float(get_total_norm(by_layer[name]))
                self.scalars[f"gradient_norm/{short_name(name)}"] = norm
        everything = [gradient for gradients in by_layer.values() for gradient in gradients]
        self._squared_norms[optimizer] = float(get_total_norm(everything)) ** 2
        self.scalars["gradient_norm/all"] = math.sqrt(sum(self._squared_norms.values()))


def short_name(name: str) -> str:
    """Return the name of a layer in the network."""
    return name.removeprefix("network.")


def is_activation(module: nn.Module) -> bool:
    """Return whether a module is an elementwise activation function of PyTorch."""
    return type(module).__module__ == nn.ReLU.__module__ and not isinstance(module, NOT_MONITORED)


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance, both (C,), of each channel of x (N, C, ...)."""
    x = definition.at_least_float32(x)
    reduced = [d for d in range(x.dim()) if d != 1]
    mean = x.mean(reduced, keepdim=True)
    # This is ten times as fast as torch.var_mean.
    var = (x - mean).square_().mean(reduced)
    return mean.flatten(), var


def running_lag(
    mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor
) -> tuple[float, float]:
    """Return the lag of running mean and running variance behind other statistics, all (C,).

    The first is the difference of the means in running standard deviations, the second
    is log2(variance / running variance). Both are root mean squares over the channels.

    Args:
        mean, var: the statistics of a batch or of the population.
        running_mean, running_var: the running statistics.
    """
    running_var = running_var + EPS
    return (
        _root_mean_square((mean - running_mean) / running_var.sqrt()),
        _root_mean_square(((var + EPS) / running_var).log2()),
    )


def population_lag(
    running: Mapping[str, Tensor], population: Mapping[str, Tensor], layers: Iterable[str]
) -> dict[str, float]:
    """Return the lag of the running statistics behind those of the population, by TensorBoard tag.

    It is defined as in `running_lag`. Layers without running statistics are left out.

    Args:
        running, population: the running statistics of training, and statistics of the
            population. Keys are names in the state dict.
        layers: names of the layers to compare.
    """
    scalars: dict[str, float] = {}
    for layer in layers:
        last = _statistics_of(layer, running)
        target = _statistics_of(layer, population)
        if last and target:
            lag = running_lag(
                target["running_mean"],
                target["running_var"],
                last["running_mean"],
                last["running_var"],
            )
            scalars[f"population_lag/{short_name(layer)}/mean"] = lag[0]
            scalars[f"population_lag/{short_name(layer)}/var"] = lag[1]
    return scalars


def _statistics_of(layer: str, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return running_mean and running_var of a layer, each (C,); empty if there are none."""
    buffers = {
        name.rpartition(".")[2]: value
        for name, value in statistics.items()
        if name.rpartition(".")[0] == layer
    }
    return recognition.channel_values(buffers)


def _root_mean_square(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def sample(x: Tensor) -> Tensor:
    """Return about `SAMPLE` values of x in float32, evenly spaced."""
    # An odd stride takes values from all positions of an image.
    stride = max(1, x.numel() // SAMPLE) | 1
    positions = torch.arange(0, x.numel(), stride, device=x.device)
    # x.take(positions) would do the same, but not on MPS.
    return x[torch.unravel_index(positions, x.shape)].flatten().float()


def slope(activation: nn.Module, at: Tensor) -> Tensor:
    """Return the absolute slope of an elementwise activation function at each value of `at`."""
    with torch.enable_grad():
        x = at.detach().requires_grad_()
        # Calling the module would run its hooks again. In-place activations require the
        # clone.
        y = activation.forward(x.clone())
        return torch.autograd.grad(y.sum(), x)[0].abs()


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the first floating-point tensor of the arguments, detached; None if there is none."""
    for given in (*args, *kwargs.values()):
        if isinstance(given, Tensor) and given.is_floating_point() and given.numel():
            return given.detach()
    return None
