"""Measurements: time and memory of a norm, as ratios to PyTorch's BatchNorm."""

import statistics
import time
from collections.abc import Iterator
from math import inf

import torch
from torch import nn

from bn_lightning.norms.check.findings import Comparison, NotApplicable, measurement
from bn_lightning.norms.check.subject import Norm
from bn_lightning.norms.convert import TORCH

SHAPES = {
    2: (256, 120),
    3: (64, 48, 128),
    4: (64, 48, 16, 16),
    5: (16, 48, 8, 8, 8),
}
# Below this share of a core, a time is that of other programs too.
LEAST_SHARE = 0.85


@measurement("Time per training step.")
def time_per_step(norm: Norm) -> Iterator[Comparison]:
    kind = norm.one_kind
    shape = SHAPES[kind.num_dims]
    layer = norm.build(shape[1], kind.num_dims)
    layers = [layer, TORCH[kind.num_dims](shape[1])]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        share, own, reference = _times(layers, shape)
    finally:
        torch.set_num_threads(threads)
    if share < LEAST_SHARE:
        raise NotApplicable(
            f"The machine is busy: the measurement had {share:.0%} of a core. Repeat it later."
        )
    text = f"input {shape}, one thread: {1e3 * own:.2f} ms, compared with {1e3 * reference:.2f} ms"
    yield Comparison(own / reference, inf, text)


def _times(layers: list[nn.Module], shape: tuple[int, ...]) -> tuple[float, float, float]:
    """Return the share of a core that the measurement had, and the median time of each layer."""
    x, gradient = torch.randn(shape, requires_grad=True), torch.randn(shape)
    seconds: list[list[float]] = [[] for _ in layers]
    start, start_of_cpu = time.perf_counter(), time.process_time()
    for _ in range(25):
        for layer, times in zip(layers, seconds, strict=True):
            before = time.perf_counter()
            layer(x).backward(gradient)
            times.append(time.perf_counter() - before)
    share = (time.process_time() - start_of_cpu) / (time.perf_counter() - start)
    # The first steps are slower, until caches and allocator are warm.
    own, reference = (statistics.median(times[5:]) for times in seconds)
    return share, own, reference


@measurement("Memory saved for the backward pass.")
def memory(norm: Norm) -> Iterator[Comparison]:
    kind = norm.one_kind
    shape = SHAPES[kind.num_dims]
    layers = norm.build(shape[1], kind.num_dims), TORCH[kind.num_dims](shape[1])
    own, reference = (_bytes_saved(layer, shape) for layer in layers)
    yield Comparison(own / reference, inf, f"{own:,} bytes, compared with {reference:,}")


def _bytes_saved(layer: nn.Module, shape: tuple[int, ...]) -> int:
    """Return the total size of the tensors that autograd saves in a forward pass."""
    storages: dict[int, int] = {}  # size by address, because tensors can share memory

    def pack(t: torch.Tensor) -> torch.Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(torch.randn(shape, requires_grad=True))
    return sum(storages.values())
