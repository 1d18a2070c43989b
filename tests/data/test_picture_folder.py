"""The data set `folder`: parts, facts and batches."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image, ImageOps

from bn_lightning import ImageData, UserError
from bn_lightning.data.labelled_images import DataError

CLASSES = ("ant", "bee", "cat")


def write(folder, counts, seed=0):
    """Write lossless pictures of different sizes, and return their paths."""
    random = np.random.default_rng(seed)
    paths = []
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            size = *random.integers(12, 40, 2), 3
            path = folder / name / f"{number}.png"
            Image.fromarray(random.integers(0, 256, size, np.uint8)).save(path)
            paths.append(path)
    return paths


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def set_up(path="pictures", **settings):
    settings = {"resize": 10, "batch_size": 16, "workers": 0} | settings
    data = ImageData("folder", dataset_args={"path": str(path)}, **settings)
    data.setup("fit")
    return data


def samples(loader):
    """Return the images and labels of all batches."""
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels).tolist()


def expected_image(path, mode="RGB"):
    picture = ImageOps.fit(Image.open(path), (10, 10), Image.Resampling.LANCZOS).convert(mode)
    pixels = torch.from_numpy(np.array(picture)).float() / 255
    return pixels.permute(2, 0, 1) if mode == "RGB" else pixels[None]


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_each_picture_is_in_one_part_with_its_class(here, mode):
    paths = write(here / "pictures", dict.fromkeys(CLASSES, 24))
    data = set_up(grayscale=mode == "L")
    assert data.classes == CLASSES and data.image_size == (10, 10)
    assert data.in_channels == (3 if mode == "RGB" else 1)
    parts = [samples(getattr(data, f"{part}_dataloader")()) for part in ("train", "val", "test")]
    assert [len(labels) for _, labels in parts] == [61, 5, 6]
    assert [parts[2][1].count(label) for label in range(3)] == [2, 2, 2]
    found = {
        image.numpy().tobytes(): label for part in parts for image, label in zip(*part, strict=True)
    }
    expected = {
        expected_image(path, mode).numpy().tobytes(): CLASSES.index(path.parent.name)
        for path in paths
    }
    assert found == expected and len(found) == 72
    assert data.class_counts().sum() == 61
    assert data.notes() == [
        "5 of the training images are held out for validation",
        "6 images are split off as the test set",
    ]
    # predict names the files.
    names = data.test_names()
    assert torch.equal(expected_image(names[3], mode), parts[2][0][3])
    # The mean of the pictures that are not in the test set.
    others = [path for path in paths if str(path.relative_to(here)) not in names]
    pixels = torch.stack([expected_image(path, mode) for path in others]).double()
    np.testing.assert_allclose(data.facts.mean, pixels.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(data.facts.std, pixels.std((0, 2, 3), correction=0), rtol=1e-6)


def test_the_split_is_a_function_of_the_seed_and_the_settings(here):
    write(here / "pictures", dict.fromkeys(CLASSES, 20))
    names = [
        set(set_up(**settings).test_names())
        for settings in ({}, {}, {"seed": 1}, {"test_images": 12}, {"val_images": 20})
    ]
    assert names[0] == names[1] == names[4] != names[2]
    assert [len(part) for part in names] == [5, 5, 5, 12, 5]
    assert len(set_up(folds=5, fold=2).val_indices) == 11


def test_parts_of_the_folder_are_used(here):
    for part, count in (("train", 8), ("val", 3), ("test", 4)):
        write(here / "pictures" / part, dict.fromkeys(CLASSES, count), seed=count)
    data = set_up()
    sizes = [len(samples(getattr(data, f"{p}_dataloader")())[1]) for p in ("train", "val", "test")]
    assert sizes == [24, 9, 12]
    assert data.has_validation_set and not data.notes()
    assert data.identity()["images"] == {"train": 24, "val": 9, "test": 12}
    for settings, part in (
        ({"val_images": 3}, "val/"),
        ({"folds": 2, "fold": 0}, "val/"),
        ({"test_images": 3}, "test/"),
    ):
        with pytest.raises(UserError, match=f"has .*own.* in {part}"):
            set_up(**settings)


@pytest.mark.parametrize(("in_memory", "workers"), [(False, 2), (True, 2), (True, 0)])
def test_batches_do_not_depend_on_memory_and_workers(here, in_memory, workers):
    write(here / "pictures", dict.fromkeys(CLASSES, 12))
    crop = {"name": "RandomResizedCrop", "args": {"size": [10, 10]}}
    jitter = {"name": "ColorJitter", "args": {"brightness": 0.5, "hue": 0.2}}
    settings = {"flip": True, "shift": 2, "augment": [crop, jitter], "normalize": True}
    expected = set_up(**settings)
    data = set_up(**settings, in_memory=in_memory, workers=workers)
    assert isinstance(data.images.train_images, torch.Tensor) == in_memory
    for part in ("train", "val", "test"):
        batches, others = (getattr(d, f"{part}_dataloader")() for d in (data, expected))
        for batch, other in zip(batches, others, strict=True):
            assert torch.equal(batch[0], other[0]) and torch.equal(batch[1], other[1])
    assert data.test_names() == expected.test_names()


def test_broken_pictures_are_refused_or_left_out(here):
    paths = write(here / "pictures", dict.fromkeys(CLASSES, 12))
    paths[3].write_bytes(paths[3].read_bytes()[:50])
    paths[30].write_text("text")
    with pytest.raises(DataError, match=r"(?s)2 of 36 pictures.*ant/3\.png: .*cat/6\.png: not a"):
        set_up()
    data = set_up(skip_broken=True)
    parts = [samples(getattr(data, f"{part}_dataloader")())[1] for part in ("train", "val", "test")]
    assert sum(map(len, parts)) == 34
    assert "left out pictures that cannot be read: 2" in data.notes()


def test_another_list_of_files_is_other_data(here):
    paths = write(here / "pictures", dict.fromkeys(CLASSES, 12))
    checkpoint = {"data": set_up().identity()}
    (here / "pictures").rename(here / "moved")
    set_up(here / "moved").refuse_other_data(checkpoint)
    (here / "moved").rename(here / "pictures")
    paths[5].unlink()
    data = set_up()
    with pytest.raises(UserError, match=r"values differ: sha256, images test 3 \(now 2\)"):
        data.refuse_other_data(checkpoint)
    # Images that were trained on could now be in the test set.
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.TESTING))
    with pytest.raises(UserError, match=r"files in .pictures. are not those of the training"):
        data.refuse_other_data(checkpoint)
    # Test images of their own are not split off.
    for part in ("train", "test"):
        write(here / "other" / part, dict.fromkeys(CLASSES, 2))
    data = set_up("other")
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.TESTING))
    data.refuse_other_data(checkpoint)


def test_a_network_is_not_used_for_other_classes(here):
    write(here / "pictures", dict.fromkeys(CLASSES, 12))
    facts = set_up().hparams["facts"]
    (here / "pictures/bee").rename(here / "pictures/dog")
    with pytest.raises(UserError, match=r"classes ant, cat, dog, but the network is for ant, b"):
        set_up(facts=facts)


@pytest.mark.parametrize("args", [{}, {"path": "pictures", "size": 3}, {"folder": "pictures"}])
def test_the_only_argument_is_the_path(args):
    with pytest.raises(UserError, match=r"(?s)needs the path of a folder.*dataset_args\.path pic"):
        ImageData("folder", dataset_args=args)
