"""The sources of Fashion-MNIST, and the order in which `auto` tries them."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bn_lightning.data import files
from bn_lightning.data.files import File
from bn_lightning.data.labelled_images import DataError, DataNotFound, Facts, LabelledImages
from bn_lightning.data.mirrors import MIRRORS, download

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)  # fmt: skip
MEAN, STD = 0.2860, 0.3530  # of the training pixels in [0, 1]
FACTS = Facts(1, (28, 28), len(CLASSES), CLASSES, (MEAN,), (STD,))

# Installed by the package dataset-fashion-mnist of Debian and Ubuntu.
SYSTEM = Path("/usr/share/datasets/fashion-mnist")
SAMPLE = Path(__file__).parent / "sample"


def load(
    source: str = "auto",
    root: str | Path = "data",
    mirrors: Sequence[str] = MIRRORS,
    may_download: bool = True,
) -> LabelledImages:
    """Read Fashion-MNIST and verify it.

    Args:
        source: `system`, `download`, `sample`, a folder, or `auto`. `auto` uses the
            first of these that has the data: `root`, the system's copy, a download, the
            sample in this package. It warns if it uses the sample. The other sources
            have no fallback.
        root: folder for downloads, in torchvision's layout.
        mirrors: base URLs of the four .gz files. The first one that answers is tried
            first.
        may_download: if False, read existing files only, because another process has
            downloaded them.

    Raises:
        DataError: the data are missing, corrupt, or not Fashion-MNIST.
    """
    root = Path(root)
    if source == "auto":
        return _load_first(root, mirrors, may_download)
    if source == "system":
        try:
            return _read_folder(SYSTEM, files.FULL, "system")
        except DataNotFound as error:
            advice = "On Debian and Ubuntu: apt-get install dataset-fashion-mnist"
            raise DataNotFound(f"{error}\n{advice}") from error
    if source == "sample":
        return _read_folder(SAMPLE, files.SAMPLE, "sample")
    if source == "download":
        if may_download:
            download(root, mirrors)
        return _read_folder(root, files.FULL, "download")
    if not Path(source).is_dir():
        raise DataNotFound(
            f"The data source {source!r} is not a folder.\n"
            "Use a folder with the four idx files, or auto, system, download or sample."
        )
    return _read_folder(Path(source), files.FULL, "folder")


def _load_first(root: Path, mirrors: Sequence[str], may_download: bool) -> LabelledImages:
    """Return the data of the first source that has them."""
    for folder, source in ((root, "download"), (SYSTEM, "system")):
        try:
            return _read_folder(folder, files.FULL, source)
        except DataNotFound:
            pass  # expected on a new machine
        except DataError as error:
            _warn(f"{error}\nThis source is skipped. The next source is tried.")
    if may_download:
        try:
            download(root, mirrors)
            return _read_folder(root, files.FULL, "download")
        except DataError as error:
            _warn(
                f"{error}\n\n"
                f"Fashion-MNIST is neither in {root} nor in {SYSTEM}, and cannot be downloaded.\n"
                "THIS RUN USES THE PACKAGED SAMPLE: 6,000 of 60,000 training and 1,000 of 10,000 "
                "test images.\n"
                "Its accuracy is several points lower and cannot be compared with published "
                "results.\n"
                'result.json contains "data_source": "sample". To use the full data set: '
                "--data.source FOLDER"
            )
    return _read_folder(SAMPLE, files.SAMPLE, "sample")


def _warn(message: str) -> None:
    """Print a warning that is hard to overlook."""
    lines = ["", "=" * 100, "WARNING", *message.splitlines(), "=" * 100, ""]
    print("\n".join(lines), file=sys.stderr, flush=True)


def _read_folder(folder: Path, expected: Sequence[File], source: str) -> LabelledImages:
    arrays = {file.name: files.read(files.locate(folder, file), file) for file in expected}
    return LabelledImages(
        torch.from_numpy(arrays[files.TRAIN_IMAGES]),
        torch.from_numpy(arrays[files.TRAIN_LABELS]).long(),
        torch.from_numpy(arrays[files.TEST_IMAGES]),
        torch.from_numpy(arrays[files.TEST_LABELS]).long(),
        CLASSES,
        source,
        {file.name: file.sha256 for file in expected},
        folder,
        num_whole=files.FULL[0].shape[0] if source == "sample" else None,
    )
