"""Checks of labelled images, and their mean and standard deviation."""

import numpy as np
import pytest
import torch

from bn_lightning.data.labelled_images import checked, mean_and_std
from bn_lightning.errors import UserError


def returned(**changes):
    """Return valid values of a data set, except for `changes`."""
    random = np.random.default_rng(0)
    valid = {
        "train_images": random.integers(0, 256, (12, 3, 20, 24), np.uint8),
        "train_labels": np.arange(12) % 3,
        "test_images": random.integers(0, 256, (6, 3, 20, 24), np.uint8),
        "test_labels": torch.arange(6) % 3,
        "class_names": ["a", "b", "c"],
    }
    return tuple((valid | changes).values())


def test_tensors_and_arrays_are_accepted():
    values = returned(
        train_labels=(np.arange(12) % 3).astype(">i2"),
        test_images=torch.zeros(6, 3, 20, 24, dtype=torch.uint8),
        class_names=np.array(["a", "b", "c"]),
    )
    values[0].flags.writeable = False
    images = checked(values, "x")
    assert torch.equal(images.train_images, torch.tensor(values[0]))
    assert images.train_labels.tolist() == [0, 1, 2] * 4
    assert images.train_labels.dtype == images.test_labels.dtype == torch.int64
    assert images.classes == ("a", "b", "c")
    facts = images.facts()
    assert (facts.in_channels, facts.image_size, facts.num_classes) == (3, (20, 24), 3)


def test_one_channel_needs_no_dimension():
    grey = np.zeros((12, 20, 24), np.uint8)
    images = checked(returned(train_images=grey[:, None], test_images=grey[:6]), "x")
    assert images.train_images.shape == (12, 20, 24)
    assert images.facts().in_channels == 1


def test_the_checksum_depends_on_each_value_and_shape():
    base = checked(returned(), "x").sha256
    assert base == checked(returned(), "other name").sha256
    for index in range(4):
        values = list(returned())
        values[index] = values[index].copy() if index < 3 else values[index].clone()
        values[index][2] += 1 if index % 2 == 0 else -1
        assert checked(values, "x").sha256 != base
    turned = [v.reshape(-1, 3, 24, 20) if v.ndim == 4 else v for v in returned()[:4]]
    assert checked((*turned, ["a", "b", "c"]), "x").sha256 != base


ZEROS = np.zeros((12, 3, 20, 24), np.uint8)
WRONG = [
    ({"train_images": ZEROS.astype("float32")}, "train_images of type float32", "multiply by 255"),
    ({"test_images": torch.zeros(6, 3, 20, 24)}, "test_images of type float32", "multiply by 255"),
    ({"train_images": ZEROS.astype("int64")}, "train_images of type int64", "to uint8"),
    (
        {"train_images": np.zeros((12, 20, 24, 3), np.uint8)},
        r"train_images of shape \(12, 20, 24, 3\)",
        r"permute\(0, 3, 1, 2\)",
    ),
    ({"train_images": ZEROS[0, 0]}, r"train_images of shape \(20, 24\)", "It must return"),
    ({"train_images": [[1]]}, "a list as train_images", "NumPy arrays"),
    (
        {"test_images": ZEROS[:6, :, :, :5]},
        r"train_images of shape \(3, 20, 24\) and test_images of shape \(3, 20, 5\)",
        "",
    ),
    ({"train_labels": np.arange(11) % 3}, "12 train_images, but train_labels of shape", ""),
    (
        {"train_labels": np.zeros((12, 3), int)},
        r"12 train_images, but train_labels of shape \(12, 3\)",
        "",
    ),
    ({"train_labels": np.zeros(12)}, "train_labels of type float64", "int64"),
    ({"train_labels": np.arange(12) % 4}, "label 3 at index 3 of train_labels", "from 0 to 2"),
    ({"test_labels": torch.arange(6) % 3 - 1}, "label -1 at index 0 of test_labels", "from 0 to 2"),
    ({"test_images": ZEROS[:0], "test_labels": np.zeros(0, int)}, "no image in test_images", ""),
    ({"class_names": "abc"}, "a str as class_names", "sequence of names"),
    ({"class_names": None}, "a NoneType as class_names", "sequence of names"),
    ({"class_names": ["a", "b", 3]}, "the class name 3, a int", "strings"),
    ({"class_names": ["a", "b", "a"]}, "the class name 'a' more than once", "differ"),
    ({"class_names": ["a"], "train_labels": np.zeros(12, int)}, "1 class name", "two classes"),
]


@pytest.mark.parametrize(("changes", "found", "advice"), WRONG)
def test_wrong_values_are_refused(changes, found, advice):
    with pytest.raises(UserError, match=rf"(?s)The data set 'my.load' returned {found}.*{advice}"):
        checked(returned(**changes), "my.load")


@pytest.mark.parametrize(
    ("value", "found"), [(returned()[:4], "4 values"), (None, "a NoneType"), ({}, "a dict")]
)
def test_another_number_of_values_is_refused(value, found):
    with pytest.raises(UserError, match=rf"returned {found}\.\nIt must return \(train_images, "):
        checked(value, "my.load")


@pytest.mark.parametrize("shape", [(300, 20, 24), (300, 3, 20, 24)])
def test_mean_and_std_are_those_of_numpy(shape):
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8) ** 2
    mean, std = mean_and_std(torch.from_numpy(images))
    axes = (0, 2, 3) if len(shape) == 4 else (0, 1, 2)
    np.testing.assert_allclose(mean, np.atleast_1d((images / 255).mean(axes)), rtol=1e-12)
    np.testing.assert_allclose(std, np.atleast_1d((images / 255).std(axes)), rtol=1e-12)


def test_a_constant_channel_is_not_scaled():
    assert mean_and_std(torch.full((5, 4, 4), 51, dtype=torch.uint8)) == ((0.2,), (1.0,))
