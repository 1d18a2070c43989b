"""Listing of a folder of pictures."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from bn_lightning.data import folders
from bn_lightning.data.folder_parts import Part, checksum, refuse_empty_classes
from bn_lightning.data.labelled_images import DataError
from bn_lightning.errors import UserError


def make(folder, *names):
    """Create files, and return the folder. Their sizes differ."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * (number % 7))
    return folder


def names(part):
    return [os.fsdecode(name) for name in part.names]


def pairs(found, part):
    """Return pairs (name, class) of a part."""
    classes = [found.classes[label] for label in part.labels]
    return list(zip(names(part), classes, strict=True))


PARTS = [
    f"{part}/{name}/{file}"
    for part in ("train", "val", "test")
    for name in ("äpfel und birnen", "dog", "Ölbaum")
    for file in ("b.JPG", "a.jpg", "A.jpg", "deep/er/c d.png", "deep/ü.webp", "x.y.Tif")
]


@pytest.mark.parametrize("has_parts", [True, False])
def test_the_same_files_and_classes_are_found_as_by_torchvision(tmp_path, monkeypatch, has_parts):
    make(tmp_path, *PARTS)
    monkeypatch.chdir(tmp_path)
    path = Path("." if has_parts else "train")
    found = folders.find(path)
    for part in ("train", "val", "test"):
        listed = getattr(found, part)
        if not has_parts and part != "train":
            assert listed is None
            continue
        expected = torchvision.datasets.ImageFolder(part)
        assert list(found.classes) == expected.classes
        of_torchvision = [
            (Path(file).relative_to(path).as_posix(), expected.classes[label])
            for file, label in expected.samples
        ]
        assert pairs(found, listed) == sorted(of_torchvision, key=lambda pair: os.fsencode(pair[0]))
        status = [(path / name).stat() for name in names(listed)]
        assert listed.sizes.tolist() == [file.st_size for file in status]
        assert listed.times.tolist() == [file.st_mtime_ns for file in status]
        assert listed.labels.dtype == torch.int64 and len(listed) == 18
    assert found.ignored == {} and found.path == path


def test_what_is_ignored_is_counted_and_folders_beside_the_parts_are_named(tmp_path):
    make(tmp_path, "train/a/1.jpg", "train/b/1.png", "README.md", "train/list.csv", ".git/x.jpg")
    make(tmp_path, "train/a/.DS_Store", "train/a/.ipynb_checkpoints/1.jpg", "train/.cache/a/1.jpg")
    make(tmp_path, "train/b/notes.txt", "train/b/deep/jpg", "raw/a/1.jpg", "old/x.jpg")
    os.mkfifo(tmp_path / "train/a/pipe.jpg")
    (tmp_path / "train/a/folder.jpg").mkdir()
    found = folders.find(tmp_path)
    assert names(found.train) == ["train/a/1.jpg", "train/b/1.png"]
    assert found.val is None and found.test is None
    assert found.ignored == {
        folders.BESIDE + " (old, raw)": 2,
        "hidden files and folders": 4,
        "files outside of class folders": 2,
        "files without the suffix of a picture": 3,
    }


def test_links_are_followed_but_not_in_a_circle_or_to_another_class(tmp_path, monkeypatch):
    data = make(tmp_path / "data", "train/cat/1.jpg", "train/dog/2.jpg", "test/cat/3.jpg")
    make(tmp_path / "pool", "bird/4.jpg", "bird/more/5.jpg", "6.jpg")
    links = {
        "train/bird": "../../pool/bird",
        "train/cat/6.jpg": "../../../pool/6.jpg",
        "train/cat/birds": "../../../pool/bird/more",
        "train/dog/missing.jpg": "nowhere.jpg",
    }
    ignored = {
        "links to a parent folder": {
            "loop": "..",
            "train/here": ".",
            "train/cat/own": "../cat",
            "train/cat/train": "../../train",
            "train/cat/data": data.absolute(),
            "train/cat/root": tmp_path.absolute().root,
            "train/dog/itself": "itself",
            # This is inside of a folder that the link `bird` leads to.
            "train/bird/more/up": "..",
        },
        "links to the folder of another class": {
            # Two links that are a circle together.
            "train/dog/cat": "../cat",
            "train/cat/dog": "../dog",
            "train/dog/test": "../../test",
            "test/cat/train": "../../train/cat",
        },
    }
    for link, target in links.items():
        (data / link).symlink_to(target)
    for some in ignored.values():
        for link, target in some.items():
            (data / link).symlink_to(target)
    # The link `birds` leads to the current folder, which is not a parent of it.
    monkeypatch.chdir(tmp_path / "pool/bird/more")
    found = folders.find(Path("../../../data"))
    assert pairs(found, found.train) == [
        ("train/bird/4.jpg", "bird"),
        ("train/bird/more/5.jpg", "bird"),
        ("train/cat/1.jpg", "cat"),
        ("train/cat/6.jpg", "cat"),
        ("train/cat/birds/5.jpg", "cat"),
        ("train/dog/2.jpg", "dog"),
        # The check of all pictures reports it.
        ("train/dog/missing.jpg", "dog"),
    ]
    assert pairs(found, found.test) == [("test/cat/3.jpg", "cat")]
    # The link `up` is found twice.
    counts = {reason: len(some) for reason, some in ignored.items()}
    counts["links to a parent folder"] += 1
    assert found.ignored == counts
    (data / "train/horse").symlink_to("../../pool/horse")
    with pytest.raises(DataError, match=r"The link '.*/train/horse' leads to a .* not\s+exist"):
        folders.find(data)


def test_names_need_not_be_utf8(tmp_path):
    for number, name in enumerate([b"a/\xe9.jpg", b"\xe9t\xe9/1.jpg"]):
        path = tmp_path / os.fsdecode(name)
        path.parent.mkdir()
        path.write_bytes(b"x" * number)
    found = folders.find(tmp_path)
    assert found.train.names.tolist() == [b"a/\xe9.jpg", b"\xe9t\xe9/1.jpg"]
    # Class names are printed and written to JSON and YAML.
    assert found.classes == ("a", r"\xe9t\xe9")


def test_classes_that_differ_only_in_unicode_normalization_are_the_same(tmp_path):
    composed, decomposed = "b\u00e4r", "ba\u0308r"
    make(tmp_path, f"train/{composed}/1.jpg", "train/x/1.jpg", f"test/{decomposed}/1.jpg")
    found = folders.find(tmp_path)
    assert found.classes == (composed, "x")
    assert pairs(found, found.test) == [(f"test/{decomposed}/1.jpg", composed)]
    # They are two classes if both are in train/.
    make(tmp_path, f"train/{decomposed}/1.jpg")
    found = folders.find(tmp_path)
    assert found.classes == (decomposed, composed, "x")
    assert pairs(found, found.test) == [(f"test/{decomposed}/1.jpg", decomposed)]


def test_empty_classes_are_allowed_in_val_and_test(tmp_path):
    make(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/a/.keep", "val/b/1.jpg", "test/b/1.jpg")
    found = folders.find(tmp_path)
    assert found.val.labels.tolist() == found.test.labels.tolist() == [1]


OTHER_LAYOUTS = {
    "no folder": ((), r"There is no folder '.*/data'\.\nChoose .* --data.dataset_args.path PATH"),
    "no class": (["train/readme.txt"], r"'.*data/train' contains no class folders"),
    "one class": (["cat/1.jpg"], r"'.*data' has only one class, 'cat', but at least two"),
    "one folder too high": (
        ["pets/train/cat/1.jpg", "pets/train/dog/1.jpg"],
        r"only one class, 'pets', .* Did you mean the folder '.*/data/pets'",
    ),
    "pictures without classes": (
        ["train/1.jpg", "train/2.JPG", "train/list.txt"],
        r"'.*data/train' contains 2 pictures, but no class folders.\nMake a folder for each",
    ),
    "no pictures": (
        ["train/a/1.heic", "train/a/2.HEIC", "train/b/readme"],
        r"No pictures in '.*/train/a', '.*/train/b'.\n"
        r"Other files there: 2 .heic, 1 without a suffix",
    ),
    "an empty class": (
        ["a/1.jpg", "b/.keep", "c/1.png"],
        r"^No pictures in '.*/data/b'.\nAdd pictures, such as .jpg",
    ),
    "a class only in test": (
        ["train/cat/1.jpg", "train/dog/1.jpg", "test/dogs/1.jpg"],
        r"'.*data/test' has the class 'dogs', but '.*data/train' does not. Did you mean 'dog'\?\n"
        r"The classes are those of train/: cat, dog\.",
    ),
    "a class only in val": (
        [f"train/{number}/1.jpg" for number in range(30)] + ["val/zebra/.keep"],
        r"'.*data/val' has the class 'zebra', but '.*' does not\.\n.*: 0, 1, 10, .* and 22 more\.",
    ),
    "no pictures in val": (
        ["train/cat/1.jpg", "train/dog/1.jpg", "val/cat/.keep"],
        r"There are no pictures in '.*data/val'.\nAdd pictures, or remove the folder",
    ),
    "no class folders in test": (
        ["train/cat/1.jpg", "train/dog/1.jpg", "test/1.jpg"],
        r"There are no pictures in '.*data/test'",
    ),
    "no train": (["test/a/1.jpg", "val/a/1.jpg"], r"has no folder train/, but test/, val/"),
    "another name for train": (
        ["Train/a/1.jpg", "Train/b/1.jpg", "Test/a/1.jpg"],
        r"has no folder train/, but Test/, Train/\.\nRename",
    ),
}


@pytest.mark.parametrize("kind", OTHER_LAYOUTS)
def test_other_layouts_are_refused_on_one_screen(tmp_path, kind):
    files, message = OTHER_LAYOUTS[kind]
    with pytest.raises(DataError, match=message) as caught:
        folders.find(make(tmp_path / "data", *files))
    lines = str(caught.value).splitlines()
    assert len(lines) <= 12
    assert "ERROR" not in lines[0] and caught.value.exit_code == 2


def test_a_class_may_have_the_name_of_a_part(tmp_path):
    """For example a class of trains: the layout with parts, or another case, is used."""
    make(tmp_path / "1", "train/train/1.jpg", "train/bus/1.jpg")
    assert folders.find(tmp_path / "1").classes == ("bus", "train")
    make(tmp_path / "2", "Train/1.jpg", "bus/1.jpg")
    assert folders.find(tmp_path / "2").classes == ("Train", "bus")


def test_a_file_is_not_a_folder(tmp_path, monkeypatch):
    make(tmp_path, "pets.zip")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"'pets.zip' is a file, not a folder. Unpack it"):
        folders.find(Path("pets.zip"))
    with pytest.raises(DataError, match=rf"no folder 'pets.zip/train' in '{tmp_path}'"):
        folders.find(Path("pets.zip/train"))


@contextlib.contextmanager
def not_root():
    """Run as a user to whom the permissions of files apply."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65_534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public():
    """A folder that every user may read. pytest's folders are private."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.parametrize("closed", ["", "train", "train/a", "train/a/deep", "test/b"])
def test_unreadable_folders_are_not_skipped(public, closed):
    make(public / "data", "train/a/deep/1.jpg", "train/a/2.jpg", "train/b/1.jpg", "test/b/1.jpg")
    with not_root():
        folders.find(public / "data")
    folder = public / "data" / closed
    for mode in (0o000, 0o300):
        folder.chmod(mode)
        with (
            not_root(),
            pytest.raises(DataError, match=rf"'{folder}' cannot be read: Permission denied\."),
        ):
            folders.find(public / "data")
    folder.chmod(0o755)


def test_links_into_an_unreadable_folder_are_not_skipped(public):
    make(public / "data", "a/1.jpg", "b/1.jpg")
    make(public / "closed", "more/2.jpg", "3.jpg")
    (public / "closed").chmod(0o000)
    (public / "data/a/link").symlink_to(public / "closed/more")
    with not_root(), pytest.raises(DataError, match=r"data/a/link' cannot be read: Permission"):
        folders.find(public / "data")
    (public / "closed").chmod(0o755)


# Parts


def test_the_checksum_depends_on_the_files_and_not_on_their_place_or_time(tmp_path):
    files = [f"train/{name}/{number}.jpg" for name in "abc" for number in range(9)]

    def of(folder):
        found = folders.find(folder)
        return checksum(found.classes, [found.train])

    one = make(tmp_path / "one", *files)
    expected = of(one)
    for file in reversed(files):
        other = tmp_path / "two" / "other" / file
        other.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(one / file, other)
        os.utime(other, (1, 1))
    assert of(tmp_path / "two/other") == expected
    seen = {expected}
    changes = [
        lambda: (one / files[0]).write_bytes(b"longer content"),
        lambda: (one / files[1]).rename(one / "train/a/renamed.jpg"),
        lambda: (one / files[2]).rename(one / "train/b/20.jpg"),
        lambda: (one / "train/b").rename(one / "train/bb"),
        lambda: make(one, "train/a/a-much-longer-name.jpg"),
    ]
    for change in changes:
        change()
        assert of(one) not in seen
        seen.add(of(one))


def test_the_checksum_depends_on_the_parts_and_labels_but_not_on_the_width_of_the_names(tmp_path):
    found = folders.find(make(tmp_path, "a/1.jpg", "a/2.jpg", "b/3.jpg", "b/long-name.jpg"))
    part, classes = found.train, found.classes
    first, second = part.select(np.array([0, 1])), part.select(np.array([2, 3]))
    shorter = part.select(np.array([True, True, True, False]))
    narrow = Part(shorter.names.astype("S7"), shorter.sizes, shorter.times, shorter.labels)
    relabelled = Part(part.names, part.sizes, part.times, 1 - part.labels)
    assert checksum(classes, [shorter]) == checksum(classes, [narrow])
    moved = Part(
        np.array([b"a/1.jpga/2.jp", b"g", *part.names[2:]]), part.sizes, part.times, part.labels
    )
    empty = part.select(np.array([], dtype=int))
    given = [
        [moved],
        [part, empty],
        [part],
        [first, second],
        [second, first],
        [first],
        [relabelled],
        [shorter],
    ]
    assert len({checksum(classes, parts) for parts in given}) == len(given)
    joined = Part.joined([second, first])
    assert joined.names.tolist() == part.names[[2, 3, 0, 1]].tolist()
    assert joined.labels.tolist() == [1, 1, 0, 0]
    assert joined.sizes.tolist() == part.sizes[[2, 3, 0, 1]].tolist()
    assert joined.times.tolist() == part.times[[2, 3, 0, 1]].tolist()


def test_test_pictures_are_split_off_by_class_and_seed(tmp_path):
    counts = {"a": 60, "b": 24, "c": 12}
    files = [f"{name}/{number}.jpg" for name, count in counts.items() for number in range(count)]
    found = folders.find(make(tmp_path, *files))
    for wanted, expected in ((None, [5, 2, 1]), (16, [10, 4, 2])):
        train, test = folders.with_test(found, wanted, seed=3)
        assert test.labels.bincount().tolist() == expected
        assert sorted(names(train) + names(test)) == sorted(files)
        for part in (train, test):
            assert part.names.tolist() == sorted(part.names.tolist())
            assert all(name.startswith(found.classes[label]) for name, label in pairs_of(part))
    again, other = (folders.with_test(found, 16, seed=seed)[1] for seed in (3, 4))
    assert names(again) == names(test) != names(other)
    for wanted in (0, -1, 96, 1_000):
        with pytest.raises(UserError, match=f"test_images is {wanted}; .* less than .* 96"):
            folders.with_test(found, wanted, seed=3)


def pairs_of(part):
    return zip(names(part), part.labels.tolist(), strict=True)


def test_the_own_test_pictures_are_used(tmp_path):
    found = folders.find(make(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "test/b/1.jpg"))
    assert folders.with_test(found, None, seed=0) == (found.train, found.test)
    with pytest.raises(UserError, match=r"test_images is 5, but .* Remove --data.test_images"):
        folders.with_test(found, 5, seed=0)


def test_classes_without_training_pictures_are_named(tmp_path):
    found = folders.find(make(tmp_path, "a/1.jpg", "b/1.jpg", "b/2.jpg", "c/1.jpg"))
    refuse_empty_classes(tmp_path, found.classes, found.train)
    with pytest.raises(DataError, match="without a training picture: 'a', 'c'"):
        refuse_empty_classes(tmp_path, found.classes, found.train.select(np.array([1, 2])))


@pytest.mark.parametrize("name", ["Test", "valid", "TESTING"])
def test_a_misspelt_part_is_refused(tmp_path, name):
    make(tmp_path, "train/a/1.jpg", "train/b/1.jpg", f"{name}/a/2.jpg")
    with pytest.raises(DataError, match=rf"(?s)has the folder {name}/ beside train/.*Rename it"):
        folders.find(tmp_path)
