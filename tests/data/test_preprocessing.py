"""Preprocessing of images in one and several channels."""

import pytest
import torch
from torchvision.transforms import v2

from bn_lightning.data.preprocessing import Preprocessing

MEAN, STD = (0.2, 0.4, 0.6), (0.1, 0.2, 0.3)


def raw(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.manual_seed(0))


def test_channels_are_standardized_like_torchvision():
    images = raw(5, 3, 20, 24)
    expected = v2.Normalize(MEAN, STD)(images / 255)
    before = images.clone()
    torch.testing.assert_close(Preprocessing(True, MEAN, STD)(images), expected)
    assert torch.equal(images, before)
    assert torch.equal(Preprocessing(False, MEAN, STD)(images), images / 255)
    grey = Preprocessing(True, (0.2,), (0.1,))(images[:, 0])
    torch.testing.assert_close(grey, expected[:, :1])


@pytest.mark.parametrize("size", [12, 22, 40])
def test_images_are_resized_like_torchvision(size):
    images = raw(5, 3, 20, 24)
    expected = v2.functional.resize(images / 255, [size, size], antialias=True)
    torch.testing.assert_close(Preprocessing(False, (), (), size)(images), expected)


@pytest.mark.parametrize("normalize", [False, True])
def test_invert_restores_each_value(normalize):
    shades = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    colours = torch.cat([shades, shades.flip(2), shades.flip(3)], 1)
    preprocessing = Preprocessing(normalize, MEAN, STD)
    assert torch.equal(preprocessing.invert(preprocessing(colours)), colours.permute(0, 2, 3, 1))
    grey = Preprocessing(normalize, MEAN[:1], STD[:1])
    assert torch.equal(grey.invert(grey(shades[:, 0])), shades[:, 0])
    assert preprocessing.invert(torch.zeros(2, 4, 8, 8)) is None
