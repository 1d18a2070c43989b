"""Data sets by name, as a folder of pictures, or as a function of the user."""

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from bn_lightning import lookup
from bn_lightning.data import picture_folder, sources, torchvision_sets, user_datasets
from bn_lightning.data.labelled_images import EXPECTED, Facts, LabelledImages, checked
from bn_lightning.data.mirrors import MIRRORS
from bn_lightning.errors import UserError

FASHION_MNIST = "fashion_mnist"
FOLDER = "folder"
# What is known of each data set before it is read.
KNOWN: dict[str, Facts] = {
    FASHION_MNIST: sources.FACTS,
    **{name: facts for name, (_, facts) in torchvision_sets.SETS.items()},
}
# Settings that only some data sets have. A dot stands for import paths.
OF_FASHION_MNIST = (FASHION_MNIST,), f"the data set {FASHION_MNIST!r}"
OF_FOLDER = (FOLDER,), f"the data set {FOLDER!r}"
OF_FILES = (FOLDER, "."), "images in files"
SPECIAL = {
    **dict.fromkeys(("source", "mirrors"), OF_FASHION_MNIST),
    **dict.fromkeys(("test_images", "grayscale", "skip_broken"), OF_FOLDER),
    **dict.fromkeys(("in_memory", "workers"), OF_FILES),
}
EXAMPLE = """\
A short example, in my_data.py, for --data.dataset my_data.load:

    import numpy as np

    def load(file="pictures.npz"):
        a = np.load(file)
        return a["train_x"], a["train_y"], a["test_x"], a["test_y"], ["cat", "dog"]
"""

# Images that a function of the user has returned, as long as a data module uses them.
# The runs of a study share them.
_returned: WeakValueDictionary[tuple[Any, str], LabelledImages] = WeakValueDictionary()


@dataclass(frozen=True)
class DataSet:
    """Which images are used, and how they are read; see the arguments of `ImageData`.

    Two equal objects have the same images.

    Raises:
        UserError: the name or an argument is unknown, or a setting is for other data
            sets.
    """

    name: str
    args: dict[str, Any]
    root: Path
    source: str = "auto"
    mirrors: tuple[str, ...] | None = None
    resize: int | None = None
    grayscale: bool = False
    test_images: int | None = None
    skip_broken: bool = False
    in_memory: bool = False
    seed: int = 0
    workers: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        defaults = {setting.name: setting.default for setting in fields(self)}
        for setting, (names, owner) in SPECIAL.items():
            value, default = getattr(self, setting), defaults[setting]
            if value == default or self.name in names or ("." in self.name and "." in names):
                continue
            text = "null" if default is None else str(default).lower()
            raise UserError(
                f"--data.{setting} is for {owner} only, but the data set is {self.name!r}. Remove "
                f"it; if a checkpoint or a file sets it, use --data.{setting} {text}."
            )
        if self.workers is not None and self.workers < 0:
            raise UserError(
                f"workers is {self.workers}; it must be at least 0, for example --data.workers 2."
            )

    def known_facts(self) -> Facts | None:
        """Return what is known of the data set before it is read. Nothing is imported.

        Raises:
            UserError: the name is unknown, or `args` are not those of the data set.
        """
        if self.name in KNOWN:
            if self.args:
                raise UserError(
                    f"The data set {self.name!r} takes no arguments, but dataset_args has "
                    f"{', '.join(self.args)}. Remove --data.dataset_args."
                )
            return KNOWN[self.name]
        if self.name == FOLDER:
            picture_folder.path_in(self.args)
        elif "." not in self.name:
            known = [*KNOWN, FOLDER]
            hint = lookup.did_you_mean(self.name, known)
            raise UserError(
                f"Unknown data set {self.name!r}.{hint} Use one of {', '.join(known)}, or the "
                "import path of a function such as my_data.load."
            )
        return None

    def read(self, num_workers: int, may_download: bool = True) -> LabelledImages:
        """Find or download the images, verify them, and read them if they fit in memory.

        Args:
            num_workers: number of processes that read images from files.
            may_download: see `sources.load`.

        Raises:
            DataError: the data are missing, corrupt, or not the expected ones.
            UserError: the function of the user returns something else than expected.
        """
        if self.name == FASHION_MNIST:
            mirrors = self.mirrors or MIRRORS
            return sources.load(self.source, self.root, mirrors, may_download)
        if self.name in torchvision_sets.SETS:
            return torchvision_sets.load(self.name, self.root)
        if self.name == FOLDER:
            images = picture_folder.load(
                picture_folder.path_in(self.args),
                self.root,
                self.resize or picture_folder.SIDE,
                channels=1 if self.grayscale else 3,
                test_images=self.test_images,
                skip_broken=self.skip_broken,
                seed=self.seed,
                num_workers=num_workers,
            )
        else:
            images = call(self.name, self.args, self.root, num_workers)
        return images.in_memory(num_workers) if self.in_memory else images


def call(name: str, args: dict[str, Any], root: Path, num_workers: int) -> LabelledImages:
    """Return the images of the function with an import path.

    Args:
        args: arguments of the function.
        root: folder for downloads; one process at a time calls the function.
        num_workers: number of processes that read the samples of a Dataset.

    Raises:
        UserError: the function cannot be imported or called with `args`, or returns
            something else than expected.
    """
    function = lookup.find(name, "data set", dict.fromkeys([*KNOWN, FOLDER]))
    _refuse_wrong_arguments(function, name, args)
    key = function, json.dumps(args, sort_keys=True, default=repr)
    images = _returned.get(key)
    if images is None:
        with torchvision_sets.locked(root):
            returned = function(**args)
        if isinstance(returned, tuple | list) and len(returned) == 3:
            images = user_datasets.load(returned, name, num_workers)
        else:
            images = checked(returned, name)
        _returned[key] = images
    return images


def _refuse_wrong_arguments(function: Callable[..., Any], name: str, args: dict[str, Any]) -> None:
    if not callable(function):
        raise UserError(
            f"The data set {name!r} is an object of type {type(function).__name__}; it must be a "
            f"function.\n{EXPECTED}\n{EXAMPLE}"
        )
    try:
        inspect.signature(function).bind(**args)
    except TypeError as error:
        given = f"with {', '.join(args)}" if args else "without arguments"
        advice = lookup.describe_arguments(function, args, passed=())
        raise UserError(
            f"The data set {name!r} cannot be called {given}: {error}.\n{advice}\n"
            "Set arguments with --data.dataset_args.KEY VALUE."
        ) from error
