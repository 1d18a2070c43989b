"""The data module of Fashion-MNIST."""

import gzip

import pytest
import torch
from PIL import Image

from bn_lightning import FashionMNIST, UserError
from bn_lightning.data import files, sources
from bn_lightning.data.fashion_mnist import MEAN, STD
from bn_lightning.training.batches import Epoch
from bn_lightning.training.seeds import epoch_order
from tests.conftest import needs_all_images


def set_up(**settings):
    data = FashionMNIST(source="sample", **settings)
    data.prepare_data()
    data.setup("fit")
    return data


@needs_all_images
def test_5000_of_60000_images_are_validation_images():
    data = FashionMNIST("system")
    data.prepare_data()
    data.setup("fit")
    assert data.images.train_labels[data.val_indices].bincount().tolist() == [500] * 10
    assert len(data.train_indices) == 55_000


def test_the_sample_has_the_same_fraction_of_validation_images():
    data = set_up()
    assert data.images.train_labels[data.val_indices].bincount().tolist() == [50] * 10
    assert len(data.train_indices) == 5_500


def test_an_epoch_contains_each_image_once_with_its_label():
    data = set_up(batch_size=256, seed=1)
    seen, labels = zip(*data.train_dataloader(), strict=True)
    assert [len(batch) for batch in labels] == [256] * 21 + [124]
    assert len(data.train_dataloader()) == 22
    visited = data.train_indices[epoch_order(5_500, 1, 0)]
    expected = data.images.train_images[visited]
    assert torch.equal(torch.cat(seen), expected.unsqueeze(1) / 255)
    assert torch.equal(torch.cat(labels), data.images.train_labels[visited])


def test_an_epoch_can_start_at_any_batch():
    data = set_up(batch_size=256, seed=1, flip=True, shift=2)
    batches = data.train_dataloader()
    all_batches = list(batches)
    epoch = batches.epoch()
    batches.epoch = lambda: Epoch(epoch.order, 20, epoch.augment)
    rest = list(batches)
    assert len(rest) == 2
    for found, expected in zip(rest, all_batches[20:], strict=True):
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_evaluation_images_are_not_augmented():
    plain, augmented = set_up(), set_up(flip=True, shift=3)
    for name in ("val_dataloader", "test_dataloader"):
        [one, _], *_ = getattr(plain, name)()
        [other, _], *_ = getattr(augmented, name)()
        assert torch.equal(one, other)


def test_pixels_are_scaled_to_0_to_1_or_standardized():
    [images, _], *_ = set_up().test_dataloader()
    assert (images.min(), images.max(), images.dtype) == (0, 1, torch.float32)
    assert images.shape[1:] == (1, 28, 28)
    [standardized, _], *_ = set_up(normalize=True).test_dataloader()
    torch.testing.assert_close(standardized, (images - MEAN) / STD)


@needs_all_images
def test_mean_and_std_are_those_of_the_training_pixels():
    with gzip.open(sources.SYSTEM / f"{files.TRAIN_IMAGES}.gz") as stream:
        content = stream.read()[16:]
    pixels = torch.frombuffer(bytearray(content), dtype=torch.uint8).double() / 255
    assert pixels.mean().item() == pytest.approx(MEAN, abs=5e-5)
    assert pixels.std().item() == pytest.approx(STD, abs=5e-5)


def test_without_validation_images_the_test_set_is_used_for_validation():
    data = set_up(val_images=0)
    assert len(data.train_indices) == 6_000
    [images, _], *_ = data.val_dataloader()
    [test_images, _], *_ = data.test_dataloader()
    assert torch.equal(images, test_images)
    assert data.validates_on_test_set


@pytest.mark.parametrize(
    "setting",
    [
        {"batch_size": 0},
        {"val_images": -1},
        {"seed": -1},
        {"shift": 28},
        {"shift": -1},
    ],
)
def test_settings_out_of_range_are_refused(setting):
    [(name, value)] = setting.items()
    with pytest.raises(UserError, match=f"{name} is {value};"):
        FashionMNIST(**setting)


def test_no_more_validation_images_than_training_images():
    with pytest.raises(UserError, match=r"val_images is 60000; it must be less than .* 60,000"):
        FashionMNIST("sample", val_images=60_000).prepare_data()
    assert len(set_up(val_images=59_999).val_indices) == 5_999


# Preprocessing


@pytest.mark.parametrize("normalize", [False, True])
def test_the_loaders_and_draw_share_one_preprocessing(normalize):
    data = set_up(normalize=normalize)
    raw, labels = data.test_samples()
    inputs, _ = data.test_dataloader().take(torch.arange(1_000))
    assert torch.equal(inputs, data.preprocessing(raw))
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert loader.preprocessing is data.preprocessing
    assert len(raw) == len(labels) == 1_000 and raw.dtype == torch.uint8
    assert torch.equal(data.draw(inputs), raw)
    assert torch.equal(data.draw(inputs.to(torch.float64)), raw)


@pytest.mark.parametrize("normalize", [False, True])
def test_draw_restores_each_grey_value(normalize):
    data = FashionMNIST(normalize=normalize)
    shades = torch.arange(256, dtype=torch.uint8).repeat(49).view(16, 28, 28)
    assert torch.equal(data.draw(data.preprocessing(shades)), shades)
    beyond = data.preprocessing(shades) * 3 + 1
    assert data.draw(beyond).max() == 255  # clipped
    assert data.draw(-beyond).min() == 0


def test_preprocessing_does_not_change_raw_samples():
    data = set_up(normalize=True)
    raw, _ = data.test_samples()
    before = raw.clone()
    data.preprocessing(raw)
    assert torch.equal(raw, before)


# Declarations for training


def test_runs_with_the_same_source_share_images(tmp_path):
    one = set_up()
    same = FashionMNIST("sample", batch_size=7, val_images=0, seed=5, normalize=True)
    same.reuse(one)
    assert same.images is one.images
    same.prepare_data()
    assert same.images is one.images  # not read again
    for other in (
        FashionMNIST("system"),
        FashionMNIST("auto"),
        FashionMNIST("sample", root=str(tmp_path)),
        FashionMNIST("sample", mirrors=["https://example.org"]),
    ):
        other.reuse(one)
        assert other.images is None


def test_a_module_is_built_again_from_its_hyperparameters():
    data = FashionMNIST("sample", val_images=600, flip=True)
    assert FashionMNIST(**data.hparams).hparams == data.hparams


def test_identity_contains_source_and_checksums():
    identity = set_up().identity()
    assert identity["source"] == "sample"
    assert identity["sha256"] == {file.name: file.sha256 for file in files.SAMPLE}
    identity = set_up(val_images=0, batch_size=3, seed=4).identity()
    assert identity["source"] == "sample"


def test_machine_source_and_fixed_settings_are_declared():
    assert FashionMNIST.machine_settings == ("root", "mirrors", "workers", "in_memory")
    assert FashionMNIST.source_settings == ("source",)
    fixed = {"seed", "val_images", "test_images", "folds", "fold"}
    assert set(FashionMNIST.fixed_settings) == fixed
    assert {*FashionMNIST.machine_settings, "source", "val_images"} <= set(FashionMNIST().hparams)


def test_identity_is_read_from_checkpoints_of_both_versions():
    identity = {"source": "sample", "sha256": {"a": "1"}}
    assert FashionMNIST.identity_in({"data": identity}) == identity
    # Version 0.1.0 saved it under the name of the class.
    assert FashionMNIST.identity_in({"FashionMNIST": identity}) == identity


def test_image_files_are_read_as_raw_samples(tmp_path):
    raw, _ = set_up().test_samples()
    for number in (0, 1):
        Image.fromarray(raw[number].numpy()).save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_bytes(b"not an image")
    names = [str(tmp_path / name) for name in ("1.png", "0.png", "broken.png")]
    pixels, information, num_unreadable = FashionMNIST().read_files(names, invert=False)
    assert torch.equal(pixels, raw[[1, 0]])
    expected = [{"image": name, "inverted": False} for name in names[:2]]
    assert (information, num_unreadable) == (expected, 1)
