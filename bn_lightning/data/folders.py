"""Folders of pictures: their layout, classes and parts."""

import stat
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bn_lightning import lookup
from bn_lightning.data.folder_listing import Listing, as_text, unreadable
from bn_lightning.data.folder_parts import Part
from bn_lightning.data.labelled_images import DataError
from bn_lightning.data.splits import stratified_split
from bn_lightning.errors import UserError
from bn_lightning.terminal import enumerated

TRAIN, VAL, TEST = "train", "val", "test"
# Folders of these names, in any case, are probably parts and not classes.
LIKE_PARTS = {"train", "training", "val", "valid", "validation", "eval", "test", "testing"}
BESIDE = "folders beside train/, val/ and test/"
LAYOUT = """\
Expected is a folder of pictures for each class. val/ and test/ are optional:
    {path}/train/CLASS/*.jpg
    {path}/val/CLASS/*.jpg
    {path}/test/CLASS/*.jpg
Without train/, validation and test pictures are split off:
    {path}/CLASS/*.jpg"""
MAX_NAMED = 8  # names in a message


@dataclass(frozen=True)
class PictureFolder:
    """The pictures of a folder.

    Attributes:
        path: the folder, as it was given.
        classes: names of the class folders of the training pictures, sorted.
        train, val, test: the pictures of each part; None if there is no `val/` or
            `test/`.
        ignored: number of files, folders and links that were ignored, by reason; only
            numbers above 0.
    """

    path: Path
    classes: tuple[str, ...]
    train: Part
    val: Part | None
    test: Part | None
    ignored: dict[str, int]


def find(path: Path) -> PictureFolder:
    """List the pictures in `train/CLASS/`, `val/CLASS/` and `test/CLASS/`, or in `CLASS/`.

    Class folders are searched recursively. No picture is opened.

    Raises:
        DataError: a folder cannot be read, or the layout is another one.
    """
    _refuse_other_than_folder(path)
    listing = Listing(path)
    top = listing.folders("")
    if TRAIN in top:
        names = {part: listing.folders(part) for part in (TRAIN, VAL, TEST) if part in top}
        beside = [as_text(name) for name in top if name not in names]
        _refuse_misspelt_parts(path, beside)
        if beside:
            listing.ignored[f"{BESIDE} ({enumerated(beside, MAX_NAMED)})"] = len(beside)
    else:
        _refuse_parts_without_train(path, [as_text(name) for name in top])
        names = {"": top}
    first, *others = names

    classes = tuple(as_text(name) for name in names[first])
    if len(classes) < 2:
        raise _too_few_classes(path, first, names[first], listing.num_outside[first])
    labels = {part: _labels(path, part, names[part], classes) for part in names}
    for part in names:
        listing.protect(labels[part])
    found = {part: _listed(listing, labels[part]) for part in names if names[part]}
    _refuse_empty_classes(path, found[first], labels[first])
    for part in others:
        if not found.get(part):
            raise DataError(
                f"There are no pictures in {_shown(path, part)!r}.\n"
                "Add pictures, or remove the folder. Then pictures are split off train/."
            )
    val, test = found.get(VAL), found.get(TEST)
    return PictureFolder(path, classes, found[first], val, test, dict(listing.ignored))


def with_test(folder: PictureFolder, test_images: int | None, seed: int) -> tuple[Part, Part]:
    """Return the training and the test pictures.

    Without `test/`, test pictures are split off the training pictures, with equal class
    proportions.

    Args:
        test_images: number of test pictures to split off; None for one twelfth.

    Raises:
        UserError: the number is out of range, or there is a `test/`.
    """
    if folder.test is not None:
        if test_images is None:
            return folder.train, folder.test
        raise UserError(
            f"test_images is {test_images}, but the folder {_shown(folder.path)!r} has its own "
            "test pictures in test/. Remove --data.test_images, or set it to null."
        )
    count = len(folder.train)
    default = max(1, count // 12)
    wanted = default if test_images is None else test_images
    if not 0 < wanted < count:
        raise UserError(
            f"test_images is {wanted}; it must be at least 1 and less than the number of pictures, "
            f"{count:,}. An example: --data.test_images {default}"
        )
    train, test = stratified_split(folder.train.labels, wanted, seed)
    return folder.train.select(train.numpy()), folder.train.select(test.numpy())


def _listed(listing: Listing, labels: Mapping[str, int]) -> Part:
    """Return the pictures of class folders, sorted by name.

    Args:
        labels: the label of each class folder.
    """
    parts = [listing.pictures(name, label) for name, label in labels.items()]
    part = Part.joined(parts)
    # The order in which a file system lists files is arbitrary.
    return part.select(np.argsort(part.names))


def _labels(path: Path, part: str, names: Iterable[str], classes: Sequence[str]) -> dict[str, int]:
    """Return the label of each class folder of a part.

    Raises:
        DataError: a class is not one of the training pictures.
    """
    known = {name: label for label, name in enumerate(classes)}
    # File systems differ in how they store an umlaut: as one character, or as two.
    alike = {_normalized(name): label for name, label in known.items()}
    labels = {}
    for folder in names:
        name = as_text(folder)
        label = known.get(name, alike.get(_normalized(name)))
        if label is None:
            near = "".join(
                f" Did you mean {match!r}?" for match in lookup.similar(name, classes)[:1]
            )
            raise DataError(
                f"{_shown(path, part)!r} has the class {name!r}, but {_shown(path, TRAIN)!r} does "
                f"not.{near}\n"
                f"The classes are those of train/: {enumerated(classes, MAX_NAMED)}.\n"
                "Rename or remove the folder, or add it to train/."
            )
        labels[f"{part}/{folder}" if part else folder] = label
    return labels


def _normalized(name: str) -> str:
    return unicodedata.normalize("NFC", name)


# Errors


def _refuse_other_than_folder(path: Path) -> None:
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        where = "" if path.is_absolute() else f" in {str(Path.cwd())!r}"
        raise DataError(
            f"There is no folder {_shown(path)!r}{where}.\n"
            "Choose the folder of the pictures: --data.dataset_args.path PATH"
        ) from None
    except OSError as error:
        raise unreadable(path, error) from error
    if not is_folder:
        raise DataError(
            f"{_shown(path)!r} is a file, not a folder. Unpack it if it is an archive.\n"
            + _layout(path)
        )


def _like_parts(names: Sequence[str]) -> list[str]:
    return [f"{name}/" for name in names if name.lower() in LIKE_PARTS]


def _refuse_misspelt_parts(path: Path, names: Sequence[str]) -> None:
    like_parts = _like_parts(names)
    if like_parts:
        raise DataError(
            f"{_shown(path)!r} has the folder {like_parts[0]} beside train/, which is not used.\n"
            f"Rename it to val/ or test/, or move it.\n{_layout(path)}"
        )


def _refuse_parts_without_train(path: Path, names: Sequence[str]) -> None:
    like_parts = _like_parts(names)
    if {"val/", "test/"}.isdisjoint(like_parts) and len(like_parts) < 2:
        return
    raise DataError(
        f"{_shown(path)!r} has no folder train/, but {enumerated(like_parts, MAX_NAMED)}.\n"
        "Rename the folder of the training pictures to train/. If these are classes, move all "
        f"class folders into train/.\n{_layout(path)}"
    )


def _too_few_classes(path: Path, part: str, names: Sequence[str], num_outside: int) -> DataError:
    where = _shown(path, part)
    if names:
        inside = path / part / names[0]
        is_parent = (inside / "train").is_dir()
        hint = f" Did you mean the folder {_shown(inside)!r}?" if is_parent else ""
        problem = (
            f"{where!r} has only one class, {as_text(names[0])!r}, but at least two are needed."
            f"{hint}"
        )
    elif num_outside:
        problem = (
            f"{where!r} contains {num_outside:,} pictures, but no class folders.\n"
            "Make a folder for each class, and move the pictures into them."
        )
    else:
        problem = f"{where!r} contains no class folders."
    return DataError(f"{problem}\n{_layout(path)}")


def _refuse_empty_classes(path: Path, train: Part, labels: Mapping[str, int]) -> None:
    counts = train.labels.bincount(minlength=len(labels)).tolist()
    empty = [name for name, label in labels.items() if not counts[label]]
    if not empty:
        return
    again = Listing(path)
    again.protect(labels)
    for name in empty:
        again.pictures(name, 0)
    others = again.other_suffixes.most_common(MAX_NAMED)
    files = ", ".join(f"{count:,} {suffix or 'without a suffix'}" for suffix, count in others)
    folders = [repr(_shown(path, name)) for name in empty]
    problem = f"No pictures in {enumerated(folders, MAX_NAMED)}."
    if files:
        problem += f"\nOther files there: {files}."
    raise DataError(
        f"{problem}\nAdd pictures, such as .jpg, .png or .webp, or remove these folders.\n"
        + _layout(path)
    )


def _layout(path: Path) -> str:
    return LAYOUT.format(path=_shown(path))


def _shown(path: Path, name: str = "") -> str:
    return as_text(path / name)
