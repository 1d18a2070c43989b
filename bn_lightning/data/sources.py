"""Where the images of Fashion-MNIST come from: which source is taken, in which order."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bn_lightning.data import files
from bn_lightning.data.files import DataError, File, NotThere
from bn_lightning.data.mirrors import MIRRORS, download

# Of the package dataset-fashion-mnist of Debian and Ubuntu.
SYSTEM = Path("/usr/share/datasets/fashion-mnist")
SAMPLE = Path(__file__).parent / "sample"


@dataclass(frozen=True)
class Images:
    """All images and labels, uint8 and int64, in the data set's order, with where they came from.

    `train_images` (N, 28, 28), `train_labels` (N,), and the same for test; `source` is `system`, `download`, `sample`
    or `folder`; `place` the folder; `sha256` one sum for each decompressed file.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    source: str
    place: Path
    sha256: dict[str, str]


def load(
    source: str = "auto",
    root: str | Path = "data",
    mirrors: Sequence[str] = MIRRORS,
    may_download: bool = True,
) -> Images:
    """Read Fashion-MNIST and check it.

    Args:
        source: `system`, `download`, `sample`, or a folder; `auto` takes the first that can be had of what `root`
            holds already, the system's copy, the download, and the sample inside this package, the last with a
            warning. A source that is asked for by name never falls back on another.
        root: the folder that keeps downloads, in torchvision's layout.
        mirrors: addresses of folders that hold the four .gz files; the first to answer is tried first.
        may_download: False reads what is there, for a process beside one that has downloaded already.

    Raises:
        DataError: missing, broken or wrong data; the message names the file, what was found and what was expected.
    """
    root = Path(root)
    if source == "auto":
        return _first_of(root, mirrors, may_download)
    if source == "system":
        try:
            return _read_folder(SYSTEM, files.WHOLE, "system")
        except NotThere as error:
            raise NotThere(
                f"{error}\nOn Debian and Ubuntu: apt-get install dataset-fashion-mnist"
            ) from error
    if source == "sample":
        return _read_folder(SAMPLE, files.SAMPLED, "sample")
    if source == "download":
        if may_download:
            download(root, mirrors)
        return _read_folder(root, files.WHOLE, "download")
    if not Path(source).is_dir():
        raise NotThere(
            f"There is no folder {source!r} to read Fashion-MNIST from.\n"
            "Give a folder that holds the four idx files, or one of auto, system, download, sample: --data.source auto"
        )
    return _read_folder(Path(source), files.WHOLE, "folder")


def _first_of(root: Path, mirrors: Sequence[str], may_download: bool) -> Images:
    for place, name in ((root, "download"), (SYSTEM, "system")):
        try:
            return _read_folder(place, files.WHOLE, name)
        except NotThere:
            pass  # the ordinary case on a new machine
        except DataError as error:
            _shout(f"{error}\nPassed over; the next source is tried.")
    if may_download:
        try:
            download(root, mirrors)
            return _read_folder(root, files.WHOLE, "download")
        except DataError as error:
            _shout(
                f"{error}\n\nFashion-MNIST was found neither in {root} nor in {SYSTEM}, and cannot be downloaded.\n"
                "THIS RUN USES THE PACKAGED SAMPLE: 6,000 training and 1,000 test images, not 60,000 and 10,000.\n"
                "Its accuracy is several points lower and cannot be compared with published figures. result.json says\n"
                '"data_source": "sample". For the whole data set give a folder that has it: --data.source FOLDER'
            )
    return _read_folder(SAMPLE, files.SAMPLED, "sample")


def _shout(message: str) -> None:
    lines = ["", "=" * 100, "WARNING", *message.splitlines(), "=" * 100, ""]
    print("\n".join(lines), file=sys.stderr, flush=True)


def _read_folder(folder: Path, wanted: Sequence[File], source: str) -> Images:
    arrays = {file.name: files.read(files.locate(folder, file), file) for file in wanted}
    return Images(
        torch.from_numpy(arrays[files.TRAIN_IMAGES]),
        torch.from_numpy(arrays[files.TRAIN_LABELS]).long(),
        torch.from_numpy(arrays[files.TEST_IMAGES]),
        torch.from_numpy(arrays[files.TEST_LABELS]).long(),
        source,
        folder,
        {file.name: file.sha256 for file in wanted},
    )
