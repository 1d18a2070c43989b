"""Estimated running statistics of other people's networks, and of unusual ones."""

import pytest
import torch
import torchvision
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from bn_lightning import estimate_statistics, replace_norms
from bn_lightning.norms import registry
from bn_lightning.norms.replace import NormAct
from tests.support.pooled_statistics import (
    assert_statistics,
    norms_of,
    pooled_statistics,
    randomized,
)

NETWORKS = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(num_classes=10),
    "timm": lambda: timm_network(),
}


def timm_network():
    timm = pytest.importorskip("timm")
    network = timm.create_model("mobilenetv3_small_050", num_classes=10, drop_rate=0.5)
    assert any(type(m).__name__ == "BatchNormAct2d" for m in network.modules())
    return network


@pytest.mark.parametrize(
    "norm",
    ["custom", *(pytest.param(it, marks=pytest.mark.slow) for it in (None, "ghost", "renorm"))],
)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_torchvision_and_timm(name, norm):
    network = randomized(NETWORKS[name]()).double()
    if norm:
        norm_args = {"ghost": {"virtual_batch_size": 3}, "renorm": {"warmup": 0}}
        replace_norms(network, norm, norm_args.get(norm))
        assert name != "timm" or any(isinstance(m, NormAct) for m in network.modules())
    batches = [torch.randn(size, 3, 64, 48).double() * (1 + size) for size in (4, 1, 6)]
    expected = pooled_statistics(network, batches)
    report = estimate_statistics(network, batches)
    assert report.estimated == [*expected] == [*norms_of(network)]
    assert_statistics(network, expected)
    assert network.training
    with torch.no_grad():
        assert network.eval()(batches[1]).isfinite().all()


class OwnForward(nn.Sequential):
    """PyTorch 2.11 does not compile a network in place if all of its code is in torch.nn."""

    def forward(self, x):
        return super().forward(x)


class Checkpointed(nn.Sequential):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class Twice(nn.Module):
    """A network that calls one norm layer twice, with inputs of different sizes."""

    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm, self.alias = nn.Conv2d(3, 3, 3), norm, norm

    def forward(self, x):
        return self.alias(self.conv(self.norm(x)).relu())


def layers(norm):
    make = registry.factory(norm)
    return [nn.Conv2d(3, 5, 3), make(5, 4), nn.ReLU(inplace=True), nn.Conv2d(5, 4, 3), make(4, 4)]


def batches_of(dtype=torch.float64):
    sizes = ((6, 1), (3, 4), (8, 2))
    return [(torch.randn(n, 3, 9, 7) * scale + scale).to(dtype) for n, scale in sizes]


@pytest.mark.parametrize("norm", ["custom", "builtin", "article", "renorm", "ghost"])
@pytest.mark.parametrize("kind", ["checkpointed", "twice"])
def test_checkpointing_and_a_layer_that_is_called_twice(kind, norm):
    network = Twice(registry.make(norm, 3, 4)) if kind == "twice" else Checkpointed(*layers(norm))
    randomized(network.double())
    batches = batches_of()
    expected = pooled_statistics(network, batches)
    report = estimate_statistics(network, batches)
    assert report.estimated == (["norm"] if kind == "twice" else ["1", "4"])
    assert_statistics(network, expected)
    # Training goes on.
    network(batches[0]).square().sum().backward()


@pytest.mark.parametrize("norm", ["custom", "builtin", "renorm"])
@pytest.mark.parametrize("in_place", [True, False], ids=["module.compile", "torch.compile"])
def test_compiled_network_is_exact_and_not_compiled_again(in_place, norm):
    torch._dynamo.reset()
    network, batches = randomized(OwnForward(*layers(norm)).double()), batches_of()
    expected = pooled_statistics(network, batches)
    counter = CompileCounter()
    if in_place:
        network.compile(backend=counter)
    compiled = network if in_place else torch.compile(network, backend=counter)
    compiled(batches[0])
    assert counter.frame_count
    count = counter.frame_count
    report = estimate_statistics(compiled, batches)
    prefix = "" if in_place else "_orig_mod."
    assert report.estimated == [f"{prefix}{name}" for name in expected]
    assert_statistics(network, expected)
    compiled(batches[0])
    assert counter.frame_count == count


@pytest.mark.parametrize("norm", ["custom", "builtin", "renorm", "ghost"])
@pytest.mark.parametrize("kind", ["bfloat16", "autocast"])
def test_16_bits(kind, norm):
    network = randomized(nn.Sequential(*layers(norm)))
    network = network.bfloat16() if kind == "bfloat16" else network
    batches = batches_of(torch.bfloat16 if kind == "bfloat16" else torch.float32)
    dtypes = [buffer.dtype for buffer in network.buffers()]
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        expected = pooled_statistics(network, batches)
        estimate_statistics(network, batches)
    assert [buffer.dtype for buffer in network.buffers()] == dtypes
    # A value in bfloat16 has 8 significant bits. Autocast leaves the buffers in float32.
    tolerance = 2**-8 if kind == "bfloat16" else 1e-5
    assert_statistics(network, expected, rtol=tolerance, atol=tolerance)


class ByKeyword(nn.Sequential):
    def forward(self, x):
        return self[0](input=x)


@pytest.mark.parametrize("norm", ["custom", "builtin", "renorm", "ghost"])
def test_layer_that_is_called_by_keyword(norm):
    network, batches = ByKeyword(registry.make(norm, 3, 4).double()), batches_of()
    estimate_statistics(network, batches)
    pooled = torch.cat([x.movedim(1, -1).flatten(0, -2) for x in batches])
    assert_statistics(network, {"0": (pooled.mean(0), pooled.var(0))})
