"""Measurements: time and memory of a norm, as ratios to PyTorch's BatchNorm.

Each measurement is one function with the decorator `measurement`. The table lists them
in the order of this file.
"""

import statistics
import time

import torch
from torch import Tensor, nn

from bn_lightning.norms import torch_norms
from bn_lightning.norms.check.findings import Answer, Make, measurement
from bn_lightning.norms.check.probes import FEATURES


@measurement("time per training step, input 256 x 6 x 24 x 24")
def time_after_a_convolution(make: Make) -> Answer:
    return _time_per_step(make, (256, 6, 24, 24))


@measurement("time per training step, input 256 x 120")
def time_after_a_linear_layer(make: Make) -> Answer:
    return _time_per_step(make, (256, 120))


def _time_per_step(make: Make, shape: tuple[int, ...]) -> Answer:
    """Return the ratio of the median times of a forward and backward pass."""
    num_dims, channels = len(shape), shape[1]
    layers = [make(num_dims, channels).train(), torch_norms.builtin(channels, num_dims)]
    x, gradient = torch.randn(shape, requires_grad=True), torch.randn(shape)
    seconds: list[list[float]] = [[], []]
    for _ in range(30):
        for layer, times in zip(layers, seconds, strict=True):
            start = time.perf_counter()
            layer(x).backward(gradient)
            times.append(time.perf_counter() - start)
    # The first steps are slower, until caches and allocator are warm.
    own, reference = (statistics.median(times[5:]) for times in seconds)
    return own / reference, f"{1e3 * own:.2f} ms, compared with {1e3 * reference:.2f} ms"


@measurement("memory saved for the backward pass")
def memory_saved_for_the_backward_pass(make: Make) -> Answer:
    own, reference = (_bytes_saved(layer) for layer in (make(4), torch_norms.builtin(FEATURES, 4)))
    return own / reference, f"{own:,} bytes, compared with {reference:,}"


def _bytes_saved(layer: nn.Module) -> int:
    """Return the total size of the tensors that autograd saves in a forward pass."""
    storages: dict[int, int] = {}  # size by address, because tensors can share memory

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(torch.randn(64, FEATURES, 24, 24, requires_grad=True))
    return sum(storages.values())
