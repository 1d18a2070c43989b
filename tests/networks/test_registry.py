"""Networks by name or import path: what is built, and what is refused."""

import pytest
import torch
from torch import nn

from bn_lightning import BatchNorm, UserError
from bn_lightning.networks import registry
from bn_lightning.networks.registry import ImageShape
from bn_lightning.norms import recognition

SHAPE = ImageShape(3, (20, 24), 7)
HERE = "tests.networks.test_registry."


class TwoLayers(nn.Sequential):
    """A network of a user that takes a norm."""

    def __init__(self, in_channels, image_size, num_classes, norm, width=16):
        super().__init__(
            nn.Conv2d(in_channels, width, 3), norm(width, 4), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes),
        )  # fmt: skip


class WithOwnNorms(nn.Sequential):
    """A network of a user that has norm layers of its own, and random numbers in eval mode."""

    def __init__(self, in_channels, image_size, num_classes):
        super().__init__(
            nn.Conv2d(in_channels, 6, 3), nn.BatchNorm2d(6, eps=0.1), nn.Flatten(),
            nn.LazyLinear(5), nn.BatchNorm1d(5), nn.Linear(5, num_classes),
        )  # fmt: skip

    def forward(self, x):
        return super().forward(x + torch.rand_like(x))


class OneLogitLess(nn.Sequential):
    def __init__(self, in_channels, image_size, num_classes, norm):
        super().__init__(nn.Flatten(), nn.LazyLinear(num_classes - 1))


class WrongSizes(nn.Module):
    def __init__(self, in_channels, image_size, num_classes, norm):
        super().__init__()
        self.linear = nn.Linear(5, num_classes)

    def forward(self, x):
        return self.linear(x.mean((2, 3)))


class WithoutClasses(nn.Module):
    def __init__(self, in_channels, image_size, norm):
        super().__init__()


def not_a_module(in_channels, image_size, num_classes):
    return 3


@pytest.mark.parametrize("name", ["lenet", "mlp", "resnet", HERE + "TwoLayers"])
@pytest.mark.parametrize("norm", ["custom", "builtin", "none"])
def test_a_network_has_the_norm_and_the_shape_of_the_data(name, norm):
    network = registry.build(name, SHAPE, norm, {"eps": 0.25} if norm != "none" else None)
    norms = [*recognition.layers(network).values()]
    assert (norm == "none") == (not norms)
    assert all(layer.eps == 0.25 for layer in norms)
    assert norm != "custom" or all(type(layer) is BatchNorm for layer in norms)
    assert network(torch.rand(4, 3, 20, 24)).shape == (4, 7)
    assert network.training


def test_norms_of_a_network_without_that_argument_are_replaced():
    torch.manual_seed(0)
    network = registry.build(HERE + "WithOwnNorms", SHAPE, "custom")
    assert [type(network[i]) for i in (1, 4)] == [BatchNorm, BatchNorm]
    assert (network[1].eps, network[1].num_dims, network[4].num_dims) == (0.1, 4, 2)
    # Building a network runs it once. This uses no random numbers, and changes no statistics.
    torch.manual_seed(0)
    WithOwnNorms(*SHAPE)[3]
    assert network[1].num_batches_tracked == 0 and network.training
    own = registry.build(HERE + "WithOwnNorms", SHAPE, "builtin")
    assert type(own[1]) is nn.BatchNorm2d
    assert type(registry.build(HERE + "WithOwnNorms", SHAPE, "none")[1]) is nn.Identity


class ToOnePosition(nn.Sequential):
    """Like torchvision's ResNets for small images, it has a norm behind a map of 1x1."""

    def __init__(self, in_channels, image_size, num_classes):
        super().__init__(
            nn.Conv2d(in_channels, num_classes, 6, stride=6), nn.BatchNorm2d(num_classes),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip


def test_a_new_norm_that_refuses_the_shape_of_the_old_one_is_reported():
    name = f"{__name__}.ToOnePosition"
    with pytest.raises(UserError, match=r"with --model.norm instance fails for images of 9x7 pix"):
        registry.build(name, ImageShape(1, (9, 7), 4), "instance")
    network = registry.build(name, ImageShape(1, (18, 7), 4), "instance").train()
    assert type(network[1]) is nn.InstanceNorm2d
    network(torch.rand(2, 1, 18, 7)).sum().backward()


def test_network_args_are_passed():
    network = registry.build("mlp", SHAPE, "custom", network_args={"widths": [8, 9, 10]})
    sizes = [layer.out_features for layer in network.modules() if isinstance(layer, nn.Linear)]
    assert sizes == [8, 9, 10, 7]
    assert (
        registry.build(HERE + "TwoLayers", SHAPE, "custom", None, {"width": 5})[0].out_channels == 5
    )


@pytest.mark.parametrize(
    ("name", "network_args", "messages"),
    [
        ("resnt", {}, ["Unknown network 'resnt'. Use one of lenet, mlp, resnet, torchvision.NAME"]),
        (HERE + "Nothing", {}, ["cannot be imported", "Known names: lenet, mlp"]),
        (HERE + "TwoLayer", {}, [f"Did you mean {HERE}TwoLayers?"]),
        (HERE + "WrongSizes", {}, ["cannot be multiplied", "return self.linear(x.mean((2, 3)))"]),
        (HERE + "OneLogitLess", {}, ["returns (2, 6) for 2 images", "(2, 7)", "class TwoLayers"]),
        (HERE + "WithoutClasses", {}, ["unexpected keyword argument 'num_classes'", "TwoLayers"]),
        (HERE + "not_a_module", {}, ["an object of type int", "class TwoLayers"]),
        ("mlp", {"width": 3}, ["Did you mean widths?"]),
        ("mlp", {"widths": [3, 0]}, ["widths is [3, 0]; each must be at least 1"]),
        ("resnet", {"depth": 18}, ["depth is 18; it must be one of 8, 14, 20"]),
        ("resnet", {"width": 0}, ["width is 0"]),
        (
            "lenet",
            {"activation": "swish"},
            ["Unknown activation 'swish'. Use one of sigmoid, relu"],
        ),
    ],
)
def test_a_mistake_is_reported_on_one_screen(name, network_args, messages):
    with pytest.raises(UserError) as refused:
        registry.build(name, SHAPE, "custom", None, network_args)
    text = str(refused.value)
    assert all(message in text for message in messages), text
    assert len(text.splitlines()) <= 24


def test_the_example_in_the_messages_works():
    code = registry.EXAMPLE.partition("\n\n")[2]
    lines = [line[4:] for line in code.splitlines()]
    scope = {}
    exec("\n".join(lines), scope)
    network = scope["TwoLayers"](
        *SHAPE, lambda num_features, num_dims: nn.BatchNorm2d(num_features)
    )
    assert network(torch.rand(2, 3, 20, 24)).shape == (2, 7)


@pytest.mark.parametrize("size", [(15, 28), (28, 15)])
def test_images_that_are_too_small_are_refused(size):
    with pytest.raises(UserError, match=r"at least 16x16 .*--data.resize"):
        registry.build("lenet", ImageShape(1, size, 10), "custom")
    registry.build("lenet", ImageShape(1, (16, 16), 10), "custom")
