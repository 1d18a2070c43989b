"""Estimated running statistics, compared with a plain recomputation from the layers' inputs."""

import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from bn_lightning import estimate_statistics
from bn_lightning.norms import registry
from bn_lightning.norms.article import BatchNorm as ArticleBatchNorm
from bn_lightning.norms.estimation import statistics
from bn_lightning.norms.layer import BatchNorm
from bn_lightning.norms.renorm import BatchRenorm
from tests.support.pooled_statistics import (
    assert_statistics,
    buffers_of,
    pooled_inputs,
    pooled_statistics,
    randomized,
)

LINEAR = {
    2: nn.Linear,
    3: lambda c, d: nn.Conv1d(c, d, 3),
    4: lambda c, d: nn.Conv2d(c, d, (3, 2)),
    5: lambda c, d: nn.Conv3d(c, d, (3, 1, 2)),
}
SIZES = {2: (), 3: (9,), 4: (8, 6), 5: (7, 2, 5)}
NORMS = {
    "custom": {"momentum": None},
    "builtin": {"momentum": 0.3},
    "article": {},
    # A new layer and one behind its warmup, with limits that matter.
    "renorm": {"warmup": 10, "r_max": 1.5},
    "renorm without warmup": {"warmup": 0},
    "ghost": {"virtual_batch_size": 8},
}
CASES = [
    (norm, num_dims)
    for norm in NORMS
    for num_dims in SIZES
    if norm != "article" or num_dims % 2 == 0
]


def network_of(norm, num_dims, dtype=torch.float64):
    args = NORMS[norm]

    def make(channels):
        return registry.make(norm.split()[0], channels, num_dims, args)

    linear = LINEAR[num_dims]
    layers = [linear(3, 6), make(6), nn.ReLU(inplace=True), nn.Dropout(0.5), linear(6, 5), make(5)]
    return randomized(nn.Sequential(*layers, nn.ReLU(), linear(5, 4))).to(dtype)


def batches_of(num_dims=4, dtype=torch.float64, mean=1.0, sizes=None):
    """Return batches of different sizes, means and deviations."""
    # After a linear layer, one sample has no variance.
    sizes = sizes or (7, 20, 2 if num_dims == 2 else 1, 64)
    made = []
    for i, size in enumerate(sizes):
        x = torch.randn(size, 3, *SIZES[num_dims], dtype=dtype)
        made.append(x * (1 + i) + mean * (1 + i / 10))
    return made


@pytest.mark.parametrize(("norm", "num_dims"), CASES)
def test_statistics_are_those_of_all_values_together(norm, num_dims):
    network, batches = network_of(norm, num_dims), batches_of(num_dims)
    expected = pooled_statistics(network, batches)
    report = estimate_statistics(network, [(x, None) for x in batches])
    assert report.estimated == ["1", "5"] == [*expected]
    assert report.left == {}
    assert_statistics(network, expected)


@pytest.mark.parametrize("norm", ["custom", "builtin", "article", "renorm", "ghost"])
def test_large_mean_costs_no_precision_in_float32(norm):
    network = nn.Sequential(registry.make(norm, 3, 4))
    batches = batches_of(dtype=torch.float32, mean=1e3)
    expected = pooled_statistics(network, batches)
    estimate_statistics(network, batches)
    # With E[x^2] - E[x]^2, the error would be about 0.1.
    assert_statistics(network, expected, rtol=2e-6, atol=0)


def test_deep_network_in_float32():
    network, batches = network_of("custom", 4, torch.float32), batches_of(dtype=torch.float32)
    expected = pooled_statistics(network, batches)
    estimate_statistics(network, batches)
    assert_statistics(network, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [nn.BatchNorm1d, BatchNorm, BatchRenorm])
def test_closed_form_for_a_network_that_is_a_norm_layer(make):
    layer = make(2, eps=0.25)
    # Channel 0 has the values 0, 2; 10, 12, 14, 16, and channel 1 is 1 - 3 * channel 0.
    values = torch.tensor([[0.0], [2], [10], [12], [14], [16]])
    x = torch.cat([values, 1 - 3 * values], 1)
    report = estimate_statistics(layer, x.split([2, 4]))
    assert report.estimated == [""]
    # The averages over the two batches would be 7 and 4.33 in channel 0.
    mean, var = torch.tensor([9.0, -26]), torch.tensor([42.8, 9 * 42.8])
    given = (var + 0.25).sqrt() if make is BatchRenorm else var
    names = ("running_mean", "running_std" if make is BatchRenorm else "running_var")
    assert [*statistics(layer)] == [*names]
    for name, truth in zip(names, (mean, given), strict=True):
        torch.testing.assert_close(statistics(layer)[name], truth)


def test_result_is_no_average_over_batches():
    network, batches = network_of("custom", 4), batches_of()
    inputs = pooled_inputs(network, batches)["1"]
    average = torch.stack([x.var(0) for x in inputs]).mean(0)
    estimate_statistics(network, batches)
    assert ((network[1].running_var / average - 1).abs() > 0.2).all()


# Everything else is unchanged


class NoisyNorm(nn.BatchNorm2d):
    """A norm that draws random numbers, and replaces a buffer and sets an attribute in training."""

    def forward(self, x):
        if self.training:
            self.running_mean = self.running_mean + torch.rand(()).item()
            self.newest = x
            x = x + np.random.rand() + random.random()
        return super().forward(x)


class Fails(nn.Module):
    """Fails for batches of 5 samples."""

    def forward(self, x):
        if len(x) == 5:
            raise RuntimeError("5 samples")
        return x


class Merging(nn.Conv2d):
    """A layer that changes its weights when its mode is set, as some low-rank adapters do."""

    def train(self, mode=True):
        with torch.no_grad():
            self.weight.mul_(2 if mode else 0.5)
        return super().train(mode)


def mixed_network():
    """A network in training mode with norms of all kinds, and layers in eval mode."""
    layers = [
        *(nn.Conv2d(3, 4, 3), NoisyNorm(4), nn.ReLU(inplace=True), BatchRenorm(4, warmup=0)),
        *(Merging(4, 4, 1), BatchNorm(4, momentum=None), nn.Dropout(), ArticleBatchNorm(4, 4)),
        *(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), Fails(), nn.GroupNorm(2, 4), nn.BatchNorm2d(4)),
    ]
    network = randomized(nn.Sequential(*layers)).double()
    network(torch.randn(6, 3, 5, 5).double()).square().sum().backward()
    network[0].weight.requires_grad_(False)
    network[1].weight.grad = None
    network[9].eval()
    network[12].eval()
    network[1].register_forward_hook(lambda *args: None)
    # As in a new layer.
    del network[3]._newest
    return network


def state(network):
    """Return everything but the values of running statistics, to be compared with ==."""
    found = {}
    for name, module in network.named_modules():
        for key, value in vars(module).items():
            same = {k: id(v) for k, v in value.items()} if isinstance(value, dict) else value
            found[name, key] = id(value), same
    running = {id(b) for layer in network.modules() for b in buffers_of(layer) or ()}
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        values = None if id(tensor) in running else tensor.tolist()
        grad = None if tensor.grad is None else (id(tensor.grad), tensor.grad.tolist())
        found[name] = tensor.data_ptr(), tensor.requires_grad, values, grad
    return found


def surroundings():
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    generators = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
    return modes, generators


def drawn_batches(sizes):
    for size in sizes:
        yield torch.randn(size, 3, 5, 5).double() + np.random.rand() + random.random()


MODES = {
    "grad": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails"])
def test_everything_else_is_unchanged(mode, fails):
    network = mixed_network()
    running = {name: buffer.clone() for name, buffer in statistics(network).items()}
    before = state(network)
    with MODES[mode]():
        around = surroundings()
        batches = drawn_batches((4, 5, 3) if fails else (4, 7, 3))
        with pytest.raises(RuntimeError, match="5 samples") if fails else nullcontext():
            report = estimate_statistics(network, batches)
            assert report.estimated == ["1", "3", "5", "7", "8"]
            assert [*report.left] == ["12"]
        assert surroundings() == around
    assert state(network) == before
    assert len(running) == 10
    for name, buffer in statistics(network).items():
        assert torch.equal(buffer, running[name]) == fails, name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", ["custom", "builtin", "article", "renorm"])
def test_result_does_not_depend_on_the_gradient_mode(mode, norm):
    network = nn.Sequential(registry.make(norm, 3, 4).double(), network_of(norm, 4)).eval()
    expected = pooled_statistics(network, batches := batches_of())
    with MODES[mode]():
        # Tensors that are created in inference mode.
        estimate_statistics(network, [x.clone() for x in batches])
    assert_statistics(network, expected)
    # The buffers are no inference tensors.
    network.train()(batches[0]).sum().backward()
