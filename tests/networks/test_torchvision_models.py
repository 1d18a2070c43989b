"""Networks of torchvision: channels, classes, stems, pretrained weights and refusals."""

import pytest
import torch
import torchvision
from torch import nn

from bn_lightning import BatchNorm, UserError
from bn_lightning.networks.registry import ImageShape, build
from bn_lightning.norms import recognition

GRAY = ImageShape(1, (28, 28), 7)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "efficientnet_b0"])
def test_a_network_is_built_for_small_gray_images(name):
    network = build(f"torchvision.{name}", GRAY, "custom", {"momentum": 0.03})
    norms = recognition.layers(network).values()
    assert norms and all(type(norm) is BatchNorm and norm.momentum == 0.03 for norm in norms)
    assert network(torch.rand(4, 1, 28, 28)).shape == (4, 7)


def test_color_images_and_builtin_give_torchvisions_own_network():
    torch.manual_seed(0)
    network = build("torchvision.resnet18", ImageShape(3, (40, 32), 7), "builtin")
    torch.manual_seed(0)
    own = torchvision.models.resnet18(num_classes=7)
    assert all(
        torch.equal(a, b) for a, b in zip(network.parameters(), own.parameters(), strict=True)
    )


def test_the_small_stem_keeps_the_size_of_the_images():
    network = build("torchvision.resnet18", GRAY, "custom", None, {"small_stem": True})
    x = torch.rand(2, 1, 28, 28)
    assert network.maxpool(network.conv1(x)).shape == (2, 64, 28, 28)
    with pytest.raises(UserError, match="small_stem can be used with torchvision's ResNets only"):
        build("torchvision.mobilenet_v2", GRAY, "custom", None, {"small_stem": True})


@pytest.fixture
def pretrained(monkeypatch):
    """Replace torchvision's download by weights made here; return them by network."""
    made = {}

    def weights_of(enum, *args, **kwargs):
        builder = torchvision.models.get_model_builder(
            type(enum).__name__.partition("_W")[0].lower()
        )
        torch.manual_seed(3)
        return made.setdefault(enum, builder(weights=None).state_dict())

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", weights_of)
    return made


def test_pretrained_weights_are_summed_over_the_input_channels(pretrained):
    network = build("torchvision.resnet18", GRAY, "custom", None, {"weights": "DEFAULT"})
    [state] = pretrained.values()
    torch.testing.assert_close(network.conv1.weight, state["conv1.weight"].sum(1, keepdim=True))
    assert torch.equal(network.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])
    assert torch.equal(network.layer4[1].bn2.weight, state["layer4.1.bn2.weight"])
    assert network.fc.weight.shape == (7, 512)
    # A gray image gives the same features as the same image in three channels.
    gray = torch.rand(2, 1, 28, 28)
    color = torchvision.models.resnet18()
    color.load_state_dict(state)
    expected = color.conv1(gray.expand(-1, 3, -1, -1))
    torch.testing.assert_close(network.conv1(gray), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "size", "norm", "network_args", "message"),
    [
        ("vgg11_bn", 28, "custom", {}, r"fails for images of 28x28 .*\n.*--data.resize 32"),
        ("densenet121", 28, "custom", {}, "--data.resize 32"),
        ("convnext_tiny", 28, "none", {}, "--data.resize 32"),
        ("alexnet", 64, "custom", {}, "AlexNet has no norm layer that can be replaced"),
        ("convnext_tiny", 32, "custom", {}, "LayerNorm: it normalizes the last dimensions"),
        (
            "googlenet",
            32,
            "custom",
            {"init_weights": False},
            "--model.network_args.aux_logits false",
        ),
        ("resnet19", 32, "custom", {}, "no classification network 'resnet19'. .*resnet18"),
        ("resnet18", 32, "custom", {"colour": 1}, "unexpected keyword argument 'colour'"),
        ("resnet18", 32, "custom", {"weights": "NONE"}, "'NONE'|NONE"),
    ],
)
def test_a_mistake_is_reported_on_one_screen(name, size, norm, network_args, message):
    with pytest.raises(UserError, match=message) as refused:
        build(f"torchvision.{name}", ImageShape(1, (size, size), 10), norm, None, network_args)
    assert len(str(refused.value).splitlines()) <= 24


@pytest.mark.parametrize(("name", "size"), [("densenet121", 32), ("mnasnet0_5", 28)])
def test_larger_images_work(name, size):
    network = build(f"torchvision.{name}", ImageShape(1, (size, size), 10), "custom")
    assert any(type(module) is BatchNorm for module in network.modules())


def test_networks_without_batch_norm_work_with_none():
    shape = ImageShape(1, (32, 32), 10)
    network = build("torchvision.squeezenet1_1", shape, "none")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
