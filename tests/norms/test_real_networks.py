"""The layer in networks of torchvision and timm, in place of PyTorch's layer."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from bn_lightning.norms.replace import replace_norms

# One network of each family of torchvision that has batch norm, with its arguments.
TORCHVISION = {
    "resnet18": {},
    "mobilenet_v3_small": {},
    "densenet121": {},
    "efficientnet_b0": {},
    "efficientnet_v2_s": {},
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
    "mnasnet0_5": {},
    "mobilenet_v2": {},
    "regnet_x_400mf": {},
    "regnet_y_400mf": {},
    "resnext50_32x4d": {},
    "shufflenet_v2_x0_5": {},
    "vgg11_bn": {},
}
# The smallest published one needs images of 224x224 pixels.
SMALL_MAXVIT = {
    "input_size": (64, 64),
    "stem_channels": 8,
    "partition_size": 4,
    "block_channels": [8, 16],
    "block_layers": [1, 2],
    "head_dim": 4,
    "stochastic_depth_prob": 0.0,
}
TIMM = ("timm.resnet18", "timm.efficientnet_b0", "timm.regnety_002")
# The others take too long for the quick suite.
QUICK = ("mobilenet_v3_small", "MaxVit")
ALL = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in (*TORCHVISION, "MaxVit", *TIMM)
]


def make(name):
    """Return a network with random parameters and statistics, and without dropout."""
    torch.manual_seed(0)
    if name in TIMM:
        timm = pytest.importorskip("timm")
        network = timm.create_model(name.removeprefix("timm."), num_classes=10)
    elif name == "MaxVit":
        network = torchvision.models.MaxVit(num_classes=10, **SMALL_MAXVIT)
    else:
        network = torchvision.models.get_model(name, num_classes=10, **TORCHVISION[name])
    if name == "vgg11_bn":
        # The three linear layers have 119 million parameters and no norm.
        network.classifier = nn.Linear(512 * 7 * 7, 10)
    network.double()
    for module in network.modules():
        if isinstance(module, nn.Dropout | StochasticDepth):
            module.p = 0.0
        elif isinstance(module, nn.BatchNorm2d):
            for values in (module.weight.data, module.running_var):
                values.uniform_(0.5, 1.5)
            for values in (module.bias.data, module.running_mean):
                values.normal_(std=0.1)
    return network


def images(network):
    size = 128 if isinstance(network, torchvision.models.Inception3) else 64
    x = torch.randn(
        6, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    return x.to(next(network.parameters()).dtype)


@torch.no_grad()
def logits(network):
    return [network.eval()(images(network))]


def train(network, steps, lr):
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        y = network(images(network))
        F.cross_entropy(y, torch.arange(len(y))).backward()
        optimizer.step()


def results(network):
    """Return gradients, parameters and running statistics, by kind."""
    return {
        "gradients": [parameter.grad for parameter in network.parameters()],
        "parameters": list(network.parameters()),
        "running means": [b for name, b in network.named_buffers() if name.endswith("mean")],
        "running variances": [b for name, b in network.named_buffers() if name.endswith("var")],
    }


def relative_error(ours, theirs):
    """Return the largest difference, relative to the largest value of all tensors."""
    largest = max(value.abs().max() for value in theirs)
    differences = [(a - b).abs().max() for a, b in zip(ours, theirs, strict=True)]
    return max(differences) / largest


def assert_same_results(ours, theirs, tolerance):
    found = results(ours)
    for kind, values in results(theirs).items():
        assert relative_error(found[kind], values) < tolerance, kind


@pytest.mark.parametrize("name", ALL)
def test_results_equal_those_of_pytorchs_layer(name):
    theirs = make(name)
    ours = copy.deepcopy(theirs)
    report = replace_norms(ours, "custom")
    assert [row for row in report if row.new is None and row.old != "LayerNorm"] == []
    assert not any(isinstance(module, nn.BatchNorm2d) for module in ours.modules())
    assert relative_error(logits(ours), logits(theirs)) < 1e-10
    in_float32 = (logits(copy.deepcopy(network).float()) for network in (ours, theirs))
    assert relative_error(*in_float32) < 1e-5

    for network in (ours, theirs):
        train(network, steps=1, lr=0.01)
    assert_same_results(ours, theirs, 1e-10)
    for network in (ours, theirs):
        train(network, steps=2, lr=0.01)
    assert_same_results(ours, theirs, 1e-8)

    replace_norms(ours, "builtin")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    assert relative_error(logits(ours), logits(theirs)) < 1e-8


@pytest.mark.parametrize("name", ALL)
def test_a_network_is_unchanged_there_and_back(name):
    network = make(name)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    for norm in ("custom", "renorm", "article"):
        replace_norms(network, norm, example=images(network))
        replace_norms(network, "builtin")
        after = network.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v3_small"])
def test_results_of_a_compiled_step_equal_those_of_pytorchs_layer(name):
    theirs = make(name)
    ours = copy.deepcopy(theirs)
    replace_norms(ours, "custom")
    torch.compiler.reset()
    ours.compile(backend="aot_eager")
    for network in (ours, theirs):
        train(network, steps=1, lr=0.1)
    assert_same_results(ours, theirs, 1e-10)
