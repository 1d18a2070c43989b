"""Where the images come from, and the proof that they are the right ones.

Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, https://arxiv.org/abs/1708.07747) is four files in the idx format of
MNIST. Each is checked by the sha256 of its decompressed bytes, since copies differ in how they are compressed.
"""

import gzip
import hashlib
import logging
import math
import struct
import sys
import tempfile
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bn_lightning.errors import UserError

SYSTEM = Path("/usr/share/datasets/fashion-mnist")  # Debian's and Ubuntu's package dataset-fashion-mnist
SAMPLE = Path(__file__).parent / "sample"
LAYOUTS = ("FashionMNIST/raw", "raw", "")  # within a folder; the first is torchvision's, and where downloads are kept
MIRRORS = (
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
    "https://storage.googleapis.com/tensorflow/tf-keras-datasets",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
)
REACH_SECONDS = 6.0  # for the first mirror to answer; without a network `auto` must not keep anybody waiting
STALL_SECONDS = 20.0  # for the next bytes of a download that has begun


@dataclass(frozen=True)
class File:
    """One idx file: what it must hold. `shape` is (N, 28, 28) for images, (N,) for labels."""

    name: str
    shape: tuple[int, ...]
    sha256: str

    @property
    def size(self) -> int:
        """Bytes, decompressed: magic number and dimensions, four bytes each, then a byte a value."""
        return 4 + 4 * len(self.shape) + math.prod(self.shape)


TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"

WHOLE = (
    File(TRAIN_IMAGES, (60_000, 28, 28), "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
    File(TRAIN_LABELS, (60_000,), "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
    File(TEST_IMAGES, (10_000, 28, 28), "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
    File(TEST_LABELS, (10_000,), "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
)
# The first 600 training and 100 test images of each class, in the data set's order.
SAMPLED = (
    File(TRAIN_IMAGES, (6_000, 28, 28), "cf313073c7eb485392848071d5c433571d7166043e971e3345b095cc30518084"),
    File(TRAIN_LABELS, (6_000,), "097b93fbcf9bd5bc648b1a457ddc55c9e4ab49afb33f9ecae8ce068399a75e3a"),
    File(TEST_IMAGES, (1_000, 28, 28), "7cee33c3c6414b1b86c25e665a6c4f41584269de3b7cc9768b1d351922845eef"),
    File(TEST_LABELS, (1_000,), "3128d790775889812b73c4f13923559c8b9e281d112c6ea7862acf60a206a909"),
)


class DataError(UserError):
    """Data that are missing, broken, or not Fashion-MNIST."""


class NotThere(DataError):
    """A folder, a file or a mirror that is not there, where another source may have it."""


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
            return _read_folder(SYSTEM, WHOLE, "system")
        except NotThere as error:
            raise NotThere(f"{error}\nOn Debian and Ubuntu: apt-get install dataset-fashion-mnist") from error
    if source == "sample":
        return _read_folder(SAMPLE, SAMPLED, "sample")
    if source == "download":
        if may_download:
            download(root, mirrors)
        return _read_folder(root, WHOLE, "download")
    if not Path(source).is_dir():
        raise NotThere(
            f"There is no folder {source!r} to read Fashion-MNIST from.\n"
            "Give a folder that holds the four idx files, or one of auto, system, download, sample: --data.source auto"
        )
    return _read_folder(Path(source), WHOLE, "folder")


def _first_of(root: Path, mirrors: Sequence[str], may_download: bool) -> Images:
    for place, name in ((root, "download"), (SYSTEM, "system")):
        try:
            return _read_folder(place, WHOLE, name)
        except NotThere:
            pass  # the ordinary case on a new machine
        except DataError as error:
            _shout(f"{error}\nPassed over; the next source is tried.")
    if may_download:
        try:
            download(root, mirrors)
            return _read_folder(root, WHOLE, "download")
        except DataError as error:
            _shout(
                f"{error}\n\nFashion-MNIST was found neither in {root} nor in {SYSTEM}, and cannot be downloaded.\n"
                "THIS RUN USES THE PACKAGED SAMPLE: 6,000 training and 1,000 test images, not 60,000 and 10,000.\n"
                "Its accuracy is several points lower and cannot be compared with published figures. result.json says\n"
                '"data_source": "sample". For the whole data set give a folder that has it: --data.source FOLDER'
            )
    return _read_folder(SAMPLE, SAMPLED, "sample")


def _shout(message: str) -> None:
    lines = ["", "=" * 100, "WARNING", *message.splitlines(), "=" * 100, ""]
    print("\n".join(lines), file=sys.stderr, flush=True)


def _read_folder(folder: Path, files: Sequence[File], source: str) -> Images:
    arrays = {file.name: _read(_locate(folder, file), file) for file in files}
    return Images(
        torch.from_numpy(arrays[TRAIN_IMAGES]),
        torch.from_numpy(arrays[TRAIN_LABELS]).long(),
        torch.from_numpy(arrays[TEST_IMAGES]),
        torch.from_numpy(arrays[TEST_LABELS]).long(),
        source,
        folder,
        {file.name: file.sha256 for file in files},
    )


def _locate(folder: Path, file: File) -> Path:
    candidates = [folder / layout / name for layout in LAYOUTS for name in (file.name, f"{file.name}.gz")]
    for path in candidates:
        if path.is_file():
            return path
    raise NotThere(f"{file.name} is missing: none of\n" + "".join(f"    {path}\n" for path in candidates) + "is there.")


def _read(path: Path, file: File) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Read one idx file, raw or .gz, and check it before anything is made of it."""
    expected_magic = 0x0800 + len(file.shape)  # unsigned bytes, number of dimensions
    header = struct.pack(f">I{len(file.shape)}I", expected_magic, *file.shape)
    try:
        # One byte more than expected, so that a longer file shows without being read whole.
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            content = stream.read(file.size + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _broken(path, f"compressed data that are cut off or damaged ({error})", f"{file.size:,} bytes") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if content[:4] != header[:4]:
        raise _broken(path, f"magic number 0x{content[:4].hex()}", f"0x{expected_magic:08x}")
    if len(content) != file.size:
        found = f"{len(content):,} bytes" if len(content) < file.size else "more bytes"
        raise _broken(path, found, f"{file.size:,} bytes")
    if not content.startswith(header):
        found_shape = struct.unpack(f">{len(file.shape)}I", content[4 : len(header)])
        raise _broken(path, f"dimensions {found_shape}", f"{file.shape}")
    values = np.frombuffer(bytearray(content), np.uint8, offset=len(header)).reshape(file.shape)
    if len(file.shape) == 1 and values.max() > 9:
        raise _broken(path, f"a label {values.max()}, at index {values.argmax()}", "labels from 0 to 9")
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != file.sha256:
        raise _broken(path, f"sha256 {sha256}", f"{file.sha256} (decompressed)")
    return values


def _broken(path: Path, found: str, expected: str) -> DataError:
    return DataError(
        f"{path} is not the file of Fashion-MNIST.\n    found:    {found}\n    expected: {expected}\n"
        "Remove it, or name another source: --data.source auto|system|download|sample|FOLDER"
    )


def download(root: Path, mirrors: Sequence[str] = MIRRORS) -> None:
    """Fetch what `root` lacks of the four files, in torchvision's layout.

    Each file is fetched into a folder of its own, checked there, and only then moved under its name: a download that is
    cut off leaves nothing that could be taken as good, and two processes at once do not disturb each other.

    Raises:
        NotThere: no mirror answers, or none has the right file; the message says what each of them gave.
    """
    missing = [file for file in WHOLE if not _is_good(root, file)]
    if not missing:
        return
    mirrors = _reachable(mirrors)
    target = root / LAYOUTS[0]
    try:
        target.mkdir(parents=True, exist_ok=True)
        for file in missing:
            _fetch(file, target, mirrors)
    except OSError as error:
        raise DataError(f"Fashion-MNIST cannot be kept in {target}: {error}") from error


def _is_good(root: Path, file: File) -> bool:
    try:
        _read(_locate(root, file), file)
    except DataError:
        return False
    return True


def _fetch(file: File, target: Path, mirrors: Sequence[str]) -> None:
    import pooch  # here, since only a download needs it

    pooch.get_logger().setLevel(logging.WARNING)  # it would advise to add a checksum: there is one, of the content
    faults = []
    for mirror in mirrors:
        url = f"{mirror.rstrip('/')}/{file.name}.gz"
        with tempfile.TemporaryDirectory(prefix=".download-", dir=target) as folder:
            try:
                print(f"downloading {url}", file=sys.stderr)
                fetch = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=(REACH_SECONDS, STALL_SECONDS))
                path = Path(pooch.retrieve(url, None, f"{file.name}.gz", folder, downloader=fetch))
                _read(path, file)
                path.chmod(0o644)  # a temporary file is for its owner alone
                (target / file.name).unlink(missing_ok=True)  # a broken raw file would be found before the good .gz
                path.replace(target / path.name)
            except (OSError, DataError) as error:  # requests' errors are OSErrors
                # On Windows a file cannot be replaced while a faster process, which has put it there, reads it.
                if not _is_good(target, file):
                    faults.append(f"    {url}: {_reason(error)}")
                    continue
            return
    raise NotThere(f"{file.name}.gz could not be downloaded:\n" + "\n".join(faults))


def _reason(error: Exception) -> str:
    """What went wrong, without the connection pools that requests wraps around it."""
    text, *cause = str(error).rsplit("Caused by ", 1)
    return cause[0].rsplit(": ", 1)[-1].rstrip("\"')") if cause else text


def _reachable(mirrors: Sequence[str]) -> list[str]:
    """The mirrors that answer within `REACH_SECONDS`, the rest after them; all are asked at once.

    In threads of its own, because looking up a name has no time-out that a program could set.
    """
    import requests

    answered: list[str] = []
    faults: dict[str, str] = {}
    first = threading.Event()

    def ask(mirror: str) -> None:
        try:
            with requests.get(f"{mirror.rstrip('/')}/{TEST_LABELS}.gz", stream=True, timeout=REACH_SECONDS) as reply:
                reply.raise_for_status()
            answered.append(mirror)
            first.set()
        except OSError as error:
            faults[mirror] = _reason(error)
        if len(faults) == len(mirrors):
            first.set()

    for mirror in mirrors:
        threading.Thread(target=ask, args=(mirror,), daemon=True).start()
    first.wait(REACH_SECONDS)
    if not answered:
        said = (f"    {mirror}: {faults.get(mirror, f'no answer in {REACH_SECONDS:g} s')}" for mirror in mirrors)
        raise NotThere("No mirror of Fashion-MNIST can be reached:\n" + "\n".join(said))
    known = list(answered)
    return known + [mirror for mirror in mirrors if mirror not in known]
