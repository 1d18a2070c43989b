"""A function of the user may return two Datasets instead of tensors."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from bn_lightning import ImageData, UserError
from bn_lightning.data.user_datasets import load

MODULE = """
import numpy as np
from tests.data.test_user_datasets import Pictures, arrays


def in_memory(channels):
    return *arrays(90, channels), *arrays(30, channels), ["a", "b", "c"]


def from_datasets(channels, form, targets):
    parts = [Pictures(*arrays(count, channels), form) for count in (90, 30)]
    if targets:
        for part in parts:
            part.targets = part.labels.tolist()
    return *parts, ["a", "b", "c"]
"""


def arrays(count, channels):
    """Return images and labels; the labels of a class are not equally frequent."""
    random = np.random.default_rng(count)
    images = random.integers(0, 256, (count, channels, 7, 9), np.uint8)
    return images, random.choice(3, count, p=(0.2, 0.3, 0.5))


class Pictures(Dataset):
    def __init__(self, images, labels, form="tensor"):
        self.images, self.labels, self.form = images, labels, form

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, label = self.images[index], self.labels[index]
        if self.form == "tensor":
            return torch.from_numpy(image), torch.tensor(label)
        if self.form == "array":
            return [image, label]
        return Image.fromarray(image.transpose(1, 2, 0).squeeze()), int(label)


@pytest.fixture
def own_data(tmp_path, monkeypatch):
    (tmp_path / "own_data.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_data", None)


def set_up(dataset, **settings):
    augment = [{"name": "RandomErasing", "args": {"p": 0.5}}]
    data = ImageData(
        dataset, **settings, batch_size=16, normalize=True, flip=True, shift=1, augment=augment
    )
    data.setup("fit")
    return data


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize(
    ("channels", "form", "targets", "workers"),
    [
        (3, "tensor", False, 0),
        (1, "picture", True, 2),
        (3, "picture", False, 2),
        (4, "array", True, 0),
    ],
)
def test_batches_are_those_of_the_same_images_in_memory(
    own_data, channels, form, targets, workers, in_memory
):
    args = {"channels": channels}
    expected = set_up("own_data.in_memory", dataset_args=args)
    args |= {"form": form, "targets": targets}
    data = set_up("own_data.from_datasets", dataset_args=args, workers=workers, in_memory=in_memory)
    assert data.facts == expected.facts and data.facts.in_channels == channels
    assert torch.equal(data.val_indices, expected.val_indices)
    assert isinstance(data.images.train_images, torch.Tensor) == in_memory
    for name in ("train", "val", "test"):
        batches, others = (getattr(d, f"{name}_dataloader")() for d in (data, expected))
        assert len(batches) == len(others)
        for batch, other in zip(batches, others, strict=True):
            assert torch.equal(batch[0], other[0]) and torch.equal(batch[1], other[1])
    for values, others in zip(data.test_samples(), expected.test_samples(), strict=True):
        assert torch.equal(values, others)
    # The checksum is that of the labels only.
    assert data.identity()["source"] == "own_data.from_datasets"


def test_mean_and_deviation_are_only_computed_if_they_are_used(own_data):
    args = {"channels": 3, "form": "array", "targets": True}
    data = ImageData("own_data.from_datasets", dataset_args=args, workers=0)
    assert data.facts.mean == () and data.facts.image_size == (7, 9)


class Changed(Pictures):
    """The tenth sample is replaced by another value."""

    def __init__(self, value):
        super().__init__(*arrays(20, 3))
        self.value = value

    def __getitem__(self, index):
        return self.value if index == 9 else super().__getitem__(index)


IMAGE = np.zeros((3, 7, 9), np.uint8)
WRONG = [
    (IMAGE, r"a ndarray as test_dataset\[9\]\.\nReturn \(image, label\)"),
    ((IMAGE / 255, 0), r"the image of test_dataset\[9\] of type float64\.\nIf the pixels are from"),
    (
        (IMAGE[:, :5], 0),
        r"an image of shape \(3, 5, 9\) as test_dataset\[9\]\.\nAll images must have one size",
    ),
    ((IMAGE, 3), "label 3 at index 9 of test_dataset labels"),
]


@pytest.mark.parametrize(("value", "found"), WRONG)
def test_wrong_samples_are_refused(value, found):
    train, test = Pictures(*arrays(90, 3)), Changed(value)
    with pytest.raises(UserError, match=f"The data set 'my.load' returned {found}"):
        load((train, test, ["a", "b", "c"]), "my.load", 0).in_memory(0)


def test_a_label_that_contradicts_targets_is_refused():
    train, test = Pictures(*arrays(90, 3)), Pictures(*arrays(30, 3))
    train.targets = (2 - train.labels).tolist()
    index = int((train.labels != 1).argmax())
    found = rf"the label {train.labels[index]} in train_dataset\[{index}\]"
    with pytest.raises(UserError, match=rf"returned {found}.\n.*targets\[{index}\] is"):
        load((train, test, ["a", "b", "c"]), "my.load", 0).in_memory(0)


@pytest.mark.parametrize(
    ("test", "found"),
    [
        (Pictures(*arrays(0, 3)), "no sample in test_dataset"),
        ([], "no sample in test_dataset"),
        (iter([]), "a list_iterator as test_dataset"),
        (Pictures(*arrays(9, 1)), "images of shape .3, 7, 9. for training and .7, 9. for the test"),
    ],
)
def test_wrong_datasets_are_refused(test, found):
    with pytest.raises(UserError, match=f"returned {found}"):
        load((Pictures(*arrays(90, 3)), test, ["a", "b", "c"]), "my.load", 0)


@pytest.mark.parametrize("setting", [{"workers": 2}, {"in_memory": True}])
def test_settings_for_files_are_refused_for_images_in_memory(own_data, setting):
    ((name, _),) = setting.items()
    message = f"--data.{name} is for images in files only, but the data set is 'mnist'"
    with pytest.raises(UserError, match=message):
        ImageData("mnist", **setting)
    for name in ("test_images", "skip_broken", "grayscale"):
        with pytest.raises(UserError, match=f"--data.{name} is for the data set 'folder' only"):
            ImageData("own_data.in_memory", dataset_args={"channels": 3}, **{name: 1})
