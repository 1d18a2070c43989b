"""Measurements: time and memory of a norm, as ratios to torch's BatchNorm.

A measurement is one function in this file, with the decorator `measurement`. The table prints the
measurements in the order of this file.
"""

import statistics
import time

import torch
from torch import Tensor, nn

from bn_lightning.norms import torch_norms
from bn_lightning.norms.check.findings import Answer, Make, measurement
from bn_lightning.norms.check.probes import FEATURES


@measurement("time of a step, 256 x 6 x 24 x 24")
def time_behind_a_convolution(make: Make) -> Answer:
    return _time_of_a_step(make, (256, 6, 24, 24))


@measurement("time of a step, 256 x 120")
def time_behind_a_linear_layer(make: Make) -> Answer:
    return _time_of_a_step(make, (256, 120))


def _time_of_a_step(make: Make, shape: tuple[int, ...]) -> Answer:
    num_dims, channels = len(shape), shape[1]
    layers = [make(num_dims, channels).train(), torch_norms.builtin(channels, num_dims)]
    x, gradient = torch.randn(shape, requires_grad=True), torch.randn(shape)
    seconds: list[list[float]] = [[], []]
    for _ in range(30):
        for layer, times in zip(layers, seconds, strict=True):
            start = time.perf_counter()
            layer(x).backward(gradient)
            times.append(time.perf_counter() - start)
    # The first steps, in which caches and allocator settle, do not count.
    own, reference = (statistics.median(times[5:]) for times in seconds)
    return own / reference, f"{1e3 * own:.2f} ms beside {1e3 * reference:.2f} ms"


@measurement("memory kept for the backward pass")
def memory_kept_for_the_backward_pass(make: Make) -> Answer:
    own, reference = (_bytes_kept(layer) for layer in (make(4), torch_norms.builtin(FEATURES, 4)))
    return own / reference, f"{own:,} bytes beside {reference:,}"


def _bytes_kept(layer: nn.Module) -> int:
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(torch.randn(64, FEATURES, 24, 24, requires_grad=True))
    return sum(storages.values())
