"""Search for pictures in a folder and its subfolders."""

import errno
import os
import stat
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from bn_lightning.data import pictures
from bn_lightning.data.folder_parts import Part
from bn_lightning.data.labelled_images import DataError

HIDDEN = "hidden files and folders"
OUTSIDE = "files outside of class folders"
NOT_PICTURES = "files without the suffix of a picture"
TO_PARENTS = "links to a parent folder"
TO_CLASSES = "links to the folder of another class"


class Listing:
    """What is found in a folder. Names are relative to the folder, with `/`.

    Symbolic links are followed, except those that lead in a circle or to the folder of
    another class.

    Args:
        path: the folder.

    Attributes:
        ignored: number of files, folders and links that were ignored, by reason.
        num_outside: number of pictures found by `folders`, by the folder they are in.
        other_suffixes: number of files found by `pictures` that are not pictures, by
            suffix.

    Raises:
        DataError: in the methods, if a folder cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.suffixes = {*pictures.formats()}
        self.ignored: Counter[str] = Counter()
        self.num_outside: Counter[str] = Counter()
        self.other_suffixes: Counter[str] = Counter()
        self._around_classes: set[Path] = set()

    def folders(self, name: str) -> list[str]:
        """Return the sorted names of the folders in a folder. Files are ignored."""
        found = []
        for entry, is_folder in self._entries(name):
            if is_folder:
                found.append(entry.name)
            elif entry.is_symlink() and not Path(entry.path).exists():
                # It may have been a whole class.
                raise DataError(
                    f"The link {as_text(entry.path)!r} leads to a file or folder that does not "
                    "exist.\nRepair or remove the link."
                )
            else:
                self.ignored[OUTSIDE] += 1
                self.num_outside[name] += _suffix(entry.name) in self.suffixes
        return sorted(found)

    def protect(self, names: Iterable[str]) -> None:
        """Follow no link from a class to one of these class folders, or to a folder around it."""
        for name in names:
            folder = (self.path / name).resolve()
            self._around_classes |= {folder, *folder.parents}

    def pictures(self, name: str, label: int) -> Part:
        """Return the pictures in a folder and its subfolders, in any order."""
        names: list[bytes] = []
        sizes, times = array("q"), array("q")
        folders = [name]
        while folders:
            folder = folders.pop()
            for entry, is_folder in self._entries(folder):
                if is_folder:
                    folders.append(f"{folder}/{entry.name}")
                    continue
                suffix = _suffix(entry.name)
                if suffix in self.suffixes and (found := _size_and_time(entry)):
                    names.append(os.fsencode(f"{folder}/{entry.name}"))
                    sizes.append(found[0])
                    times.append(found[1])
                else:
                    self.ignored[NOT_PICTURES] += 1
                    self.other_suffixes[as_text(suffix)] += 1
        return Part(
            np.array(names, dtype=bytes),
            np.array(sizes, dtype=np.int64),
            np.array(times, dtype=np.int64),
            torch.full((len(names),), label),
        )

    def _entries(self, name: str) -> Iterator[tuple["os.DirEntry[str]", bool]]:
        """Yield what is in a folder and not ignored, and whether it is a folder."""
        path = self.path / name
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        self.ignored[HIDDEN] += 1
                    elif entry.is_symlink() and (reason := self._reason_to_ignore(entry)):
                        self.ignored[reason] += 1
                    else:
                        yield entry, entry.is_dir()
        except OSError as error:
            raise unreadable(error.filename or path, error) from error

    def _reason_to_ignore(self, link: "os.DirEntry[str]") -> str | None:
        """Return why a link is not followed; None if it leads to a file or another folder."""
        try:
            if not link.is_dir():
                return None
        except OSError as error:
            if error.errno == errno.ELOOP:
                return TO_PARENTS
            raise
        target = Path(link.path).resolve()
        for folder in Path(link.path).parents:
            if folder.resolve().is_relative_to(target):
                return TO_PARENTS
            if folder == self.path:
                break
        return TO_CLASSES if target in self._around_classes else None


def as_text(name: str | Path) -> str:
    """Return a name for messages and records. They must be valid UTF-8, but names need not."""
    return os.fsencode(name).decode(errors="backslashreplace")


def unreadable(path: str | Path, error: OSError) -> DataError:
    """Return the exception for a file or folder that cannot be read."""
    return DataError(
        f"{as_text(path)!r} cannot be read: {error.strerror or error}.\n"
        "Change its permissions, or remove it from the data set."
    )


def _suffix(name: str) -> str:
    # A Path for each file would take most of the time.
    _, dot, suffix = name.rpartition(".")
    return (dot + suffix).lower() if dot else ""


def _size_and_time(entry: "os.DirEntry[str]") -> tuple[int, int] | None:
    """Return size and time of a file; None for something else, such as a socket."""
    try:
        found = entry.stat()
    except OSError:
        # A link without a target counts as a picture. The check of all pictures names it.
        return 0, 0
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None
