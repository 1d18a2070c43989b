"""Norms in the ways in which PyTorch uses a layer: compiled, transformed, copied, in a network."""

import copy
import pickle

import pytest
import torch
from torch.autograd import gradgradcheck
from torch.func import functional_call, grad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bn_lightning import LeNet
from bn_lightning.networks.resnet import ResNet
from bn_lightning.norms import registry
from tests.support.new_norms import output_and_gradients, shaken
from tests.support.norm_batches import LAYOUTS, scattered

SHAPES = {2: (7, 4), 4: (7, 4, 3, 2), 5: (5, 4, 2, 1, 3)}
NAMES = ("ghost", "frozen", "layer", "instance", "rms")
CASES = [(name, dims) for name in NAMES for dims in SHAPES if (name, dims) != ("instance", 2)]

every_case = pytest.mark.parametrize(("name", "num_dims"), CASES)


def layer_and_batch(name, num_dims, dtype=torch.float64):
    options = {"virtual_batch_size": 3} if name == "ghost" else {}
    return shaken(name, 4, num_dims, dtype, **options), scattered(SHAPES[num_dims], dtype)


# Compilation takes most of the time of these tests.
@pytest.mark.parametrize(
    ("name", "num_dims"),
    [pytest.param(*case, marks=[] if case[1] == 4 else pytest.mark.slow) for case in CASES],
)
def test_compiles_in_one_graph_with_equal_results(name, num_dims):
    layer, x = layer_and_batch(name, num_dims)
    expected = copy.deepcopy(layer)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = [output_and_gradients(norm, x) for norm in (compiled, expected)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(layer.state_dict(), expected.state_dict())
    torch.testing.assert_close(compiled.eval()(x), expected.eval()(x))


@every_case
def test_transforms_checkpoints_and_copies_give_the_gradient_of_a_plain_step(name, num_dims):
    layer, x = layer_and_batch(name, num_dims)
    weights = torch.linspace(0, 1, x.numel(), dtype=x.dtype).view_as(x)

    def loss(norm, x):
        buffers = {name: buffer.clone() for name, buffer in norm.named_buffers()}
        return (functional_call(norm, buffers, x).square() * weights).sum()

    _, expected = output_and_gradients(copy.deepcopy(layer), x)
    torch.testing.assert_close(grad(lambda x: loss(layer, x))(x), expected)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(output_and_gradients(other, x)[1], expected)
    repeated = output_and_gradients(lambda x: checkpoint(layer, x, use_reentrant=False), x)
    torch.testing.assert_close(repeated[1], expected)


@every_case
def test_second_derivatives_match_finite_differences(name, num_dims):
    layer, x = layer_and_batch(name, num_dims)
    assert gradgradcheck(layer, (x.requires_grad_(),), fast_mode=True)


@every_case
def test_layouts_and_operations_in_place_do_not_change_the_result(name, num_dims):
    layer, x = layer_and_batch(name, num_dims)
    expected = copy.deepcopy(layer)(x)
    layouts = [LAYOUTS[kind] for kind in ("channels last", "strided")] if num_dims > 2 else []
    for layout in (torch.clone, *layouts):
        torch.testing.assert_close(copy.deepcopy(layer)(layout(x)), expected)
    expanded = x[:1].expand(x.shape)
    torch.testing.assert_close(copy.deepcopy(layer)(expanded), copy.deepcopy(layer)(expanded + 0))
    y = F.relu(copy.deepcopy(layer)(x.requires_grad_()), inplace=True)
    torch.testing.assert_close(y, expected.relu())
    y.sum().backward()
    if name != "instance":  # PyTorch's layer does not accept an empty batch.
        assert layer(x[:0]).shape == x[:0].shape


@every_case
def test_the_layer_can_be_converted_to_16_bits(name, num_dims):
    layer, x = layer_and_batch(name, num_dims, torch.bfloat16)
    exact = copy.deepcopy(layer).double()(x.double())
    y = layer(x)
    assert y.dtype == torch.bfloat16
    # PyTorch's RMSNorm multiplies by a 16-bit gamma after a first rounding.
    torch.testing.assert_close(y.double(), exact, rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_networks_train_with_the_norm(name):
    torch.manual_seed(0)
    options = {"virtual_batch_size": 3} if name == "ghost" else {}
    make = registry.factory(name, options)
    networks = [ResNet(1, (28, 28), 10, make, depth=8, width=4)]
    networks += [] if name == "instance" else [LeNet(name, options)]
    images, labels = torch.rand(7, 1, 28, 28), torch.arange(7)
    for network in networks:
        losses = []
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
        for _ in range(3):
            loss = F.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert all(p.grad.isfinite().all() for p in network.parameters())
        assert network.eval()(images).shape == (7, 10)
