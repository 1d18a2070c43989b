"""Data sets by name, or by the import path of a function of the user."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from bn_lightning import lookup
from bn_lightning.data import sources, torchvision_sets
from bn_lightning.data.labelled_images import EXPECTED, Facts, LabelledImages, checked
from bn_lightning.errors import UserError

FASHION_MNIST = "fashion_mnist"
# What is known of each data set before it is read.
KNOWN: dict[str, Facts] = {
    FASHION_MNIST: sources.FACTS,
    **{name: facts for name, (_, facts) in torchvision_sets.SETS.items()},
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


def facts_of(name: str, args: dict[str, Any]) -> Facts | None:
    """Return what is known of a data set before it is read; None for an import path.

    Nothing is imported.

    Raises:
        UserError: the name is unknown, or the data set takes no arguments.
    """
    if name in KNOWN:
        if args:
            raise UserError(
                f"The data set {name!r} takes no arguments, but dataset_args has "
                f"{', '.join(args)}. Remove --data.dataset_args."
            )
        return KNOWN[name]
    if "." not in name:
        near = "".join(f" Did you mean {match}?" for match in lookup.similar(name, [*KNOWN])[:1])
        raise UserError(
            f"Unknown data set {name!r}.{near} Use one of {', '.join(KNOWN)}, or the import path "
            "of a function such as my_data.load."
        )
    return None


def call(name: str, args: dict[str, Any], root: Path) -> LabelledImages:
    """Return the images of the function with an import path.

    Args:
        args: arguments of the function.
        root: folder for downloads; one process at a time calls the function.

    Raises:
        UserError: the function cannot be imported or called with `args`, or returns
            something else than expected.
    """
    function = lookup.find(name, "data set", dict.fromkeys(KNOWN))
    _refuse_wrong_arguments(function, name, args)
    key = function, json.dumps(args, sort_keys=True, default=repr)
    images = _returned.get(key)
    if images is None:
        with torchvision_sets.locked(root):
            images = checked(function(**args), name)
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
