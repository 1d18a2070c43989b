"""Data sets of torchvision: read, and downloaded if necessary, by torchvision's classes.

torchvision is imported only when a data set is read, because this takes a second.
"""

import http.client
import socket
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from bn_lightning.data.labelled_images import (
    DataError,
    DataNotFound,
    Facts,
    LabelledImages,
    checked,
)
from bn_lightning.errors import UserError, describe_error

GREY, COLOUR = (1, (28, 28)), (3, (32, 32))
# Name of the class in torchvision.datasets, and what is known before its data are read.
SETS = {
    "mnist": ("MNIST", Facts(*GREY, 10)),
    "kmnist": ("KMNIST", Facts(*GREY, 10)),
    "cifar10": ("CIFAR10", Facts(*COLOUR, 10)),
    "cifar100": ("CIFAR100", Facts(*COLOUR, 100)),
    "svhn": ("SVHN", Facts(*COLOUR, 10)),
}
STALL_SECONDS = 20.0  # until the server answers, or sends the next bytes
DOWNLOAD_ERRORS = (
    *(OSError, RuntimeError, EOFError, http.client.HTTPException),
    *(tarfile.TarError, zlib.error),
)


def load(name: str, root: Path) -> LabelledImages:
    """Read a data set from `root`, after downloading it if it is missing or corrupt.

    Args:
        name: a key of `SETS`.

    Raises:
        DataError: the data cannot be read or downloaded.
        UserError: a package is missing.
    """
    if name == "svhn" and find_spec("scipy") is None:
        raise UserError(f"The data set {name!r} needs SciPy: pip install scipy")
    import torchvision

    dataset = getattr(torchvision.datasets, SETS[name][0])
    try:
        return checked(_read(dataset, root), name, root)
    # torchvision's errors for corrupt files are of many classes.
    except Exception as error:
        problem = describe_error(error)
    try:
        # Other processes wait for the download.
        with locked(root):
            try:
                return checked(_read(dataset, root), name, root)
            except Exception:
                _download(name, dataset, root)
            return checked(_read(dataset, root), name, root)
    except DOWNLOAD_ERRORS as error:
        expected = "".join(f"\n    {root / path}" for path in _files(dataset))
        raise DataNotFound(
            f"The data set {name!r} cannot be read or downloaded.\n"
            f"read:     {problem}\n"
            f"download: {describe_error(error)}\n"
            f"These files are expected:{expected}\n"
            "Copy them there, or choose another folder: --data.root FOLDER"
        ) from error


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Let one process at a time read or download data.

    Raises:
        DataError: the lock file cannot be created in `root`.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / ".lock")
        lock.acquire()
    except OSError as error:
        raise DataError(
            f"The folder {str(root)!r} for data cannot be written: {error.strerror or error}.\n"
            "Choose another folder: --data.root FOLDER"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _read(dataset: Any, root: Path, download: bool = False) -> tuple[Any, ...]:
    """Return images and labels of training and test, and the names of the classes."""
    if hasattr(dataset, "split_list"):  # SVHN
        parts = [dataset(root, split=split, download=download) for split in ("train", "test")]
        arrays = [array for part in parts for array in (part.data, part.labels)]
        return *arrays, [str(digit) for digit in range(10)]
    parts = [dataset(root, train=train, download=download) for train in (True, False)]
    arrays = [array for part in parts for array in _arrays(part)]
    return *arrays, parts[0].classes


def _arrays(part: Any) -> tuple[Any, Any]:
    # CIFAR's images are (N, 32, 32, 3), and its labels are a list.
    images = part.data.transpose(0, 3, 1, 2) if part.data.ndim == 4 else part.data
    return images, torch.as_tensor(part.targets)


def _download(name: str, dataset: Any, root: Path) -> None:
    """Download the files, and move them to `root` when all are complete.

    torchvision unpacks in place. It does not verify the unpacked files of MNIST, so it
    would later accept those of an interrupted download.
    """
    print(f"downloading {name} to {root}", file=sys.stderr)
    timeout = socket.getdefaulttimeout()
    with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as folder:
        # torchvision sets no timeout.
        socket.setdefaulttimeout(STALL_SECONDS)
        try:
            _read(dataset, Path(folder), download=True)
        finally:
            socket.setdefaulttimeout(timeout)
        for path in _files(dataset):
            target = root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / path).replace(target)


def _files(dataset: Any) -> list[str]:
    """Return the paths of the files that torchvision reads, relative to its root."""
    if hasattr(dataset, "split_list"):  # SVHN
        return [dataset.split_list[split][1] for split in ("train", "test")]
    if hasattr(dataset, "resources"):  # MNIST
        names = [url.removesuffix(".gz") for url, _ in dataset.resources]
        return [f"{dataset.__name__}/raw/{name}" for name in names]
    lists = [*dataset.train_list, *dataset.test_list]
    names = [*(name for name, _ in lists), dataset.meta["filename"]]
    return [f"{dataset.base_folder}/{name}" for name in names]
