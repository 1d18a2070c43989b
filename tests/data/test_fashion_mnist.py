import gzip

import pytest
import torch

from bn_lightning import FashionMNIST, UserError
from bn_lightning.data import sources
from bn_lightning.data.fashion_mnist import MEAN, STD
from bn_lightning.training.batches import Epoch
from bn_lightning.training.seeds import epoch_order
from tests.conftest import needs_all_images


def ready(**settings):
    data = FashionMNIST(source="sample", **settings)
    data.prepare_data()
    data.setup("fit")
    return data


@needs_all_images
def test_5000_of_60000_are_held_out():
    data = FashionMNIST("system")
    data.prepare_data()
    data.setup("fit")
    assert data.images.train_labels[data.val_indices].bincount().tolist() == [500] * 10
    assert len(data.train_indices) == 55_000


def test_of_the_sample_the_same_proportion_is_held_out():
    data = ready()
    assert data.images.train_labels[data.val_indices].bincount().tolist() == [50] * 10
    assert len(data.train_indices) == 5_500


def test_batches_show_each_image_once_with_its_label():
    data = ready(batch_size=256, seed=1)
    seen, labels = zip(*data.train_dataloader(), strict=True)
    assert [len(batch) for batch in labels] == [256] * 21 + [124]
    assert len(data.train_dataloader()) == 22
    expected = data.images.train_images[data.train_indices][epoch_order(5_500, 1, 0)]
    assert torch.equal(torch.cat(seen), expected.unsqueeze(1) / 255)
    assert torch.equal(torch.cat(labels), data.images.train_labels[data.train_indices][epoch_order(5_500, 1, 0)])


def test_an_epoch_can_begin_at_any_batch():
    data = ready(batch_size=256, seed=1, flip=True, shift=2)
    batches = data.train_dataloader()
    whole = list(batches)
    epoch = batches.epoch()
    batches.epoch = lambda: Epoch(epoch.order, 20, epoch.augment)
    rest = list(batches)
    assert len(rest) == 2
    for ours, truth in zip(rest, whole[20:], strict=True):
        assert torch.equal(ours[0], truth[0]) and torch.equal(ours[1], truth[1])


def test_evaluation_sees_the_images_as_they_are():
    plain, augmented = ready(), ready(flip=True, shift=3)
    for name in ("val_dataloader", "test_dataloader"):
        [one, _], *_ = getattr(plain, name)()
        [other, _], *_ = getattr(augmented, name)()
        assert torch.equal(one, other)


def test_pixels_are_in_0_to_1_or_standardized():
    [images, _], *_ = ready().test_dataloader()
    assert (images.min(), images.max(), images.dtype, images.shape[1:]) == (0, 1, torch.float32, (1, 28, 28))
    [standardized, _], *_ = ready(normalize=True).test_dataloader()
    torch.testing.assert_close(standardized, (images - MEAN) / STD)


@needs_all_images
def test_mean_and_deviation_are_those_of_the_training_pixels():
    with gzip.open(sources.SYSTEM / f"{sources.TRAIN_IMAGES}.gz") as stream:
        content = stream.read()[16:]
    pixels = torch.frombuffer(bytearray(content), dtype=torch.uint8).double() / 255
    assert pixels.mean().item() == pytest.approx(MEAN, abs=5e-5)
    assert pixels.std().item() == pytest.approx(STD, abs=5e-5)


def test_without_validation_images_the_test_set_validates():
    data = ready(val_images=0)
    assert len(data.train_indices) == 6_000
    [images, _], *_ = data.val_dataloader()
    [test_images, _], *_ = data.test_dataloader()
    assert torch.equal(images, test_images)
    assert data.validates_on_test_set


@pytest.mark.parametrize(
    "setting", [{"batch_size": 0}, {"val_images": 60_000}, {"val_images": -1}, {"seed": -1}, {"shift": 28}]
)
def test_wrong_settings(setting):
    with pytest.raises(UserError):
        FashionMNIST(**setting)
