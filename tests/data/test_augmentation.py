import torch

from bn_lightning.data.augmentation import Augmentation


def test_augmentation_is_a_function_of_seed_epoch_and_image():
    images = torch.randint(1, 256, (50, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    augmentation = Augmentation(50, seed=1, epoch=2, flip=True, shift=3)
    whole = augmentation(images, torch.arange(50))
    some = torch.tensor([7, 3, 49])
    assert torch.equal(Augmentation(50, 1, 2, True, 3)(images[some], some), whole[some])
    for other in ((2, 2), (1, 3)):
        assert not torch.equal(Augmentation(50, *other, True, 3)(images, torch.arange(50)), whole)
    # By hand: mirrored first, then moved, with black behind it.
    shifts, flips = augmentation.shifts.squeeze(-1).tolist(), augmentation.flips.tolist()
    assert {dy for dy, _ in shifts} == set(range(-3, 4)) and 10 < sum(flips) < 40
    for image, (dy, dx), flip, result in zip(images, shifts, flips, whole, strict=True):
        moved = torch.zeros_like(image)
        source = image.flip(1) if flip else image
        moved[max(dy, 0) : 28 + min(dy, 0), max(dx, 0) : 28 + min(dx, 0)] = source[
            max(-dy, 0) : 28 + min(-dy, 0), max(-dx, 0) : 28 + min(-dx, 0)
        ]
        assert torch.equal(result, moved)
    assert torch.equal(Augmentation(50, 1, 2, False, 0)(images, torch.arange(50)), images)
