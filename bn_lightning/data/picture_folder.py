"""The data set `folder`: pictures in folders of classes, read from their files."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bn_lightning.data import checked_pictures, folder_parts, folders
from bn_lightning.data.folder_parts import Part
from bn_lightning.data.labelled_images import DataError, LabelledImages
from bn_lightning.data.picture_files import PictureFiles
from bn_lightning.errors import UserError

SIDE = 64  # default of --data.resize
MAX_NAMED = 8  # broken pictures in an error message


def path_in(args: Mapping[str, Any]) -> Path:
    """Return the path of the folder in `dataset_args`.

    Raises:
        UserError: there is no path, or there are other arguments.
    """
    if set(args) != {"path"}:
        given = f"has {', '.join(args)}" if args else "is empty"
        raise UserError(
            "The data set 'folder' needs the path of a folder, and no other argument, but "
            f"dataset_args {given}.\n"
            "An example: --data.dataset folder --data.dataset_args.path pictures"
        )
    return Path(str(args["path"]))


def load(
    path: Path,
    root: Path,
    side: int = SIDE,
    channels: int = 3,
    test_images: int | None = None,
    skip_broken: bool = False,
    seed: int = 0,
    num_workers: int = 0,
) -> LabelledImages:
    """Find the pictures of a folder, and check each of them once.

    Args:
        path: the folder: `train/CLASS/*`, if they exist `val/CLASS/*` and
            `test/CLASS/*`, or only `CLASS/*`.
        root: folder in which the result of the check is kept.
        side: height and width to which pictures are resized and cropped.
        channels: 3 for RGB, 1 for grey.
        test_images: number of pictures to split off as a test set, if there is no
            `test/`; None for one twelfth.
        skip_broken: whether to leave out pictures that cannot be read.
        seed: seed of that split.
        num_workers: number of processes that read pictures.

    Raises:
        DataError: the folder is not as expected, or a picture cannot be read.
        UserError: `test_images` does not fit the folder.
    """
    found = folders.find(path)
    train, test = folders.with_test(found, test_images, seed)
    parts = [part for part in (train, test, found.val) if part is not None]
    notes = [f"ignored {reason}: {count:,}" for reason, count in found.ignored.items()]
    # One pass over all parts has one progress bar.
    all_names = Part.joined(parts)
    checked = checked_pictures.check(path, all_names, side, channels, root, num_workers)
    if checked.errors:
        if not skip_broken:
            raise _broken(path, all_names.names, checked.errors)
        notes.append(f"left out pictures that cannot be read: {len(checked.errors):,}")
    is_good = np.ones(len(all_names), bool)
    is_good[list(checked.errors)] = False
    ends = np.cumsum([len(part) for part in parts])
    masks = np.split(is_good, ends[:-1])
    good = [part.select(mask) for part, mask in zip(parts, masks, strict=True)]
    folder_parts.refuse_empty_classes(path, found.classes, good[0])
    if found.test is None:
        notes.insert(0, f"{len(good[1]):,} images are split off as the test set")
    mean, std = checked_pictures.mean_and_std(checked.sums[: ends[0]][masks[0]], side * side)
    images = [PictureFiles(path, part.names, side, channels) for part in good]
    return LabelledImages(
        images[0],
        good[0].labels,
        images[1],
        good[1].labels,
        found.classes,
        source="folder",
        sha256=folder_parts.checksum(found.classes, good),
        folder=path,
        val=None if found.val is None else (images[2], good[2].labels),
        splits_test=found.test is None,
        mean=mean,
        std=std,
        notes=tuple(notes),
        test_names=tuple(str(path / os.fsdecode(name)) for name in good[1].names),
    )


def _broken(path: Path, names: np.ndarray, errors: Mapping[int, str]) -> DataError:
    shown = [f"    {os.fsdecode(names[i])}: {errors[i]}" for i in list(errors)[:MAX_NAMED]]
    if len(errors) > MAX_NAMED:
        shown.append(f"    and {len(errors) - MAX_NAMED:,} more")
    return DataError(
        f"{len(errors):,} of {len(names):,} pictures in {str(path)!r} cannot be read:\n"
        + "\n".join(shown)
        + "\nRepair or remove them, or leave them out: --data.skip_broken true"
    )
