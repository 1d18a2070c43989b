"""Flips and shifts of training images."""

import pytest
import torch

from bn_lightning.data.augmentation import Augmentation


def test_flips_and_shifts_depend_on_seed_epoch_and_image_only():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (50, 28, 28), dtype=torch.uint8, generator=generator)
    augmentation = Augmentation(50, seed=1, epoch=2, flip=True, shift=3)
    all_images = augmentation(images, torch.arange(50))
    some = torch.tensor([7, 3, 49])
    assert torch.equal(Augmentation(50, 1, 2, True, 3)(images[some], some), all_images[some])
    for other in ((2, 2), (1, 3)):
        assert not torch.equal(
            Augmentation(50, *other, True, 3)(images, torch.arange(50)), all_images
        )
    # The same by hand: flipped first, then shifted, with a black border.
    shifts, flips = augmentation.shifts.squeeze(-1).tolist(), augmentation.flips.tolist()
    assert {dy for dy, _ in shifts} == set(range(-3, 4)) and 10 < sum(flips) < 40
    for image, (dy, dx), flip, result in zip(images, shifts, flips, all_images, strict=True):
        moved = torch.zeros_like(image)
        source = image.flip(1) if flip else image
        moved[max(dy, 0) : 28 + min(dy, 0), max(dx, 0) : 28 + min(dx, 0)] = source[
            max(-dy, 0) : 28 + min(-dy, 0), max(-dx, 0) : 28 + min(-dx, 0)
        ]
        assert torch.equal(result, moved)
    assert torch.equal(Augmentation(50, 1, 2, False, 0)(images, torch.arange(50)), images)


def test_disabled_flip_or_shift_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (50, 28, 28), dtype=torch.uint8, generator=generator)
    flips = Augmentation(50, 1, 2, flip=True, shift=0)(images, torch.arange(50))
    for image, flipped in zip(images, flips, strict=True):
        assert torch.equal(flipped, image) or torch.equal(flipped, image.flip(1))
    shifts = Augmentation(50, 1, 2, flip=False, shift=27)
    assert not shifts.flips.any()
    # A shift of 27 of 28 pixels leaves one line of the image.
    moved = shifts(images, torch.arange(50))
    assert moved.shape == images.shape and moved.dtype == images.dtype


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_images_need_not_be_square(shape):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (20, *shape), dtype=torch.uint8, generator=generator)
    augmentation = Augmentation(20, seed=1, epoch=0, flip=True, shift=1)
    for image, (dy, dx), flip, result in zip(
        images,
        augmentation.shifts.squeeze(-1).tolist(),
        augmentation.flips.tolist(),
        augmentation(images, torch.arange(20)),
        strict=True,
    ):
        source = image.flip(1) if flip else image
        expected = torch.zeros(shape[0] + 2, shape[1] + 2, dtype=torch.uint8)
        expected[1 + dy : 1 + dy + shape[0], 1 + dx : 1 + dx + shape[1]] = source
        assert torch.equal(result, expected[1:-1, 1:-1])


def test_the_channels_of_an_image_move_together():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (20, 3, 12, 16), dtype=torch.uint8, generator=generator)
    augmentation, indices = Augmentation(20, 1, 2, flip=True, shift=3), torch.arange(20)
    channels = [augmentation(images[:, channel], indices) for channel in range(3)]
    assert torch.equal(augmentation(images, indices), torch.stack(channels, 1))
