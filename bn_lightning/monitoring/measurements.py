"""What is measured in one monitored step: norm layers, activations and gradients."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from bn_lightning.norms import definition, recognition

PERCENTILES = (15, 50, 85)  # of figure 1 in Ioffe and Szegedy 2015
SAMPLE = 4_096  # values of a layer that percentiles and saturation are computed from
SATURATED = 0.05  # of the steepest slope of an activation function
EPS = 1e-5
# These are not elementwise or, in training, have a random slope.
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


class Measurements:
    """Scalars and histograms of one monitored step, by TensorBoard tag.

    A step may take several batches. What its first forward pass shows is measured before the step
    has changed anything.

    Attributes:
        scalars: what was measured since the last `take`.
        histograms: values of all channels (C,), where they were asked for.
    """

    def __init__(self) -> None:
        self._steepest: dict[nn.Module, float] = {}  # slope of each activation
        self.begin_step(with_histograms=False)

    def begin_step(self, with_histograms: bool) -> None:
        """Forget the step before."""
        self.scalars: dict[str, float] = {}
        self.histograms: dict[str, Tensor] = {}
        self._with_histograms = with_histograms
        self._norms: set[str] = set()  # norm layers that have run in this step
        self._inputs: list[tuple[nn.Module, Tensor]] = []  # of activations, in execution order
        self._squares: dict[Optimizer, float] = {}  # squared gradient norm of its parameters

    def take(self) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Return scalars and histograms, and keep none of them."""
        taken = self.scalars, self.histograms
        self.scalars, self.histograms, self._squares = {}, {}, {}
        return taken

    # Norm layers

    def measure_norm(
        self, name: str, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Measure a norm layer before its forward pass; with a name this is a forward pre-hook."""
        if name in self._norms:
            return  # a second call in this step: the first has moved the running statistics
        self._norms.add(name)
        kept = [*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)]
        figures = recognition.by_channel(dict(kept))
        x = _first_tensor(args, kwargs)
        if x is not None and x.dim() > 1 and all(len(v) == x.size(1) for v in figures.values()):
            mean, var = batch_statistics(x)
            figures |= {"batch_mean": mean, "batch_var": var}
            if {"running_mean", "running_var"} <= figures.keys():
                running_mean, running_var = figures["running_mean"], figures["running_var"]
                lag = running_lag(mean, var, running_mean, running_var)
                self.scalars[f"running_lag/{name}/mean"] = lag[0]
                self.scalars[f"running_lag/{name}/var"] = lag[1]
        for what, by_channel in figures.items():
            self.scalars[f"channel_0/{name}/{what}"] = float(by_channel[0])
            if self._with_histograms:
                # A copy, since the forward pass changes the running statistics in place.
                self.histograms[f"{what}/{name}"] = by_channel.clone()

    # Activations

    def keep_activation_input(
        self, activation: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Keep a sample of what an activation is given: a forward pre-hook."""
        x = _first_tensor(args, kwargs)
        if x is not None:
            self._inputs.append((activation, sample(x)))

    def measure_activations(self) -> None:
        """Measure the inputs that were kept, numbered in execution order."""
        for number, (activation, values) in enumerate(self._inputs, 1):
            levels = np.percentile(values.cpu().numpy(), PERCENTILES)
            for percentile, level in zip(PERCENTILES, levels, strict=True):
                self.scalars[f"activation_input/{number}/p{percentile}"] = float(level)
            if activation not in self._steepest:
                around_0 = torch.linspace(-8, 8, 1_601, device=values.device)
                self._steepest[activation] = float(slope(activation, around_0).max())
            is_flat = slope(activation, values) <= SATURATED * self._steepest[activation]
            self.scalars[f"saturated/{number}"] = float(is_flat.float().mean())
        self._inputs = []

    # Gradients

    @property
    def has_gradients(self) -> bool:
        """Whether gradients were measured since the last `take`."""
        return bool(self._squares)

    def measure_gradients(self, module: nn.Module, optimizer: Optimizer) -> None:
        """Measure the gradient norm of each layer before an optimizer's first step."""
        if optimizer in self._squares:
            return
        own = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        self._squares[optimizer] = 0.0
        for name, layer in module.named_modules():
            of_layer = [p for p in layer.parameters(recurse=False) if p in own]
            gradients = [p.grad for p in of_layer if p.grad is not None]
            if gradients:
                own -= set(of_layer)  # a parameter of two layers counts in the first
                norm = float(get_total_norm(gradients))
                self._squares[optimizer] += norm**2
                self.scalars[f"gradient_norm/{short_name(name)}"] = norm
        self.scalars["gradient_norm/all"] = math.sqrt(sum(self._squares.values()))


def short_name(name: str) -> str:
    """Return the name of a layer within the network."""
    return name.removeprefix("network.")


def is_activation(module: nn.Module) -> bool:
    """Return whether a module is an elementwise activation function of torch."""
    return type(module).__module__ == nn.ReLU.__module__ and not isinstance(module, NOT_MONITORED)


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance (C,) of the channels of x (N, C, ...)."""
    x = definition.at_least_float32(x)
    reduced = [d for d in range(x.dim()) if d != 1]
    mean = x.mean(reduced, keepdim=True)
    # This takes a tenth of the time of torch.var_mean.
    var = (x - mean).square_().mean(reduced)
    return mean.flatten(), var


def running_lag(
    mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor
) -> tuple[float, float]:
    """Return how far running statistics (C,) are from those of the batch (C,).

    Root mean squares over the channels: of the difference of the means in running deviations, and
    of log2(batch variance / running variance).
    """
    running_var = running_var + EPS
    return (
        _root_mean_square((mean - running_mean) / running_var.sqrt()),
        _root_mean_square(((var + EPS) / running_var).log2()),
    )


def _root_mean_square(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def sample(x: Tensor) -> Tensor:
    """Return about `SAMPLE` values of x in float32, evenly spaced."""
    # The distance is odd, so that the values come from all positions of an image.
    distance = max(1, x.numel() // SAMPLE) | 1
    return x.take(torch.arange(0, x.numel(), distance, device=x.device)).float()


def slope(activation: nn.Module, at: Tensor) -> Tensor:
    """Return the absolute slope of an elementwise activation function, of the shape of `at`."""
    with torch.enable_grad():
        x = at.detach().requires_grad_()
        # A call would run the hooks again. The clone is for activations that work in place.
        y = activation.forward(x.clone())
        return torch.autograd.grad(y.sum(), x)[0].abs()


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return what a module is given, without its gradient; None if it has no values to measure."""
    for given in (*args, *kwargs.values()):
        if isinstance(given, Tensor) and given.is_floating_point() and given.numel():
            return given.detach()
    return None
