"""The layer in torchvision's networks, in place of PyTorch's layer."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bn_lightning.norms.convert import from_torch

models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
from torchvision.ops import StochasticDepth  # noqa: E402

NETWORKS = ["resnet18", "mobilenet_v3_small", "densenet121", "efficientnet_b0", "vgg11_bn"]


def make(name, dtype):
    """Return a network with random parameters and statistics, and without dropout."""
    torch.manual_seed(0)
    network = models.get_model(name, num_classes=10).to(dtype)
    for module in network.modules():
        if isinstance(module, nn.Dropout | StochasticDepth):
            module.p = 0.0
        elif isinstance(module, nn.BatchNorm2d):
            for values in (module.weight.data, module.running_var):
                values.uniform_(0.5, 1.5)
            for values in (module.bias.data, module.running_mean):
                values.normal_(std=0.1)
    return network


def images(dtype):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 64, 64, generator=generator, dtype=torch.float64).to(dtype)


def evaluation(network):
    with torch.no_grad():
        return network.eval()(images(next(network.parameters()).dtype))


def training_step(network):
    """Train one step. Return gradients, parameters and running statistics, by kind and name."""
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    F.cross_entropy(network(images(torch.float64)), torch.arange(8)).backward()
    optimizer.step()
    return {
        "gradients": {name: p.grad for name, p in network.named_parameters()},
        "parameters": dict(network.named_parameters()),
        "running means": {n: b for n, b in network.named_buffers() if n.endswith("mean")},
        "running variances": {n: b for n, b in network.named_buffers() if n.endswith("var")},
    }


def relative_error(ours, theirs):
    """Return the largest difference, relative to the largest value of all tensors."""
    largest = max(value.abs().max() for value in theirs.values())
    return max((ours[n] - value).abs().max() for n, value in theirs.items()) / largest


# The others take too long for the quick suite.
QUICK = ("resnet18", "mobilenet_v3_small")
ALL = [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in NETWORKS]


@pytest.mark.parametrize("name", ALL)
def test_results_equal_those_of_pytorchs_layer(name):
    theirs = make(name, torch.float64)
    ours = from_torch(copy.deepcopy(theirs))
    assert relative_error({"logits": evaluation(ours)}, {"logits": evaluation(theirs)}) < 1e-10
    in_float32 = (evaluation(copy.deepcopy(network).float()) for network in (ours, theirs))
    assert relative_error(*({"logits": logits} for logits in in_float32)) < 1e-5
    assert_same_step(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_results_of_a_compiled_step_equal_those_of_pytorchs_layer(name):
    theirs = make(name, torch.float64)
    ours = from_torch(copy.deepcopy(theirs))
    torch.compiler.reset()
    ours.compile(backend="aot_eager")
    assert_same_step(ours, theirs)


def assert_same_step(ours, theirs):
    found = training_step(ours)
    for kind, values in training_step(theirs).items():
        assert relative_error(found[kind], values) < 1e-10, kind
