"""The four files of Fashion-MNIST: their expected content, and a reader that verifies it.

Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, https://arxiv.org/abs/1708.07747) uses the
idx format of MNIST. The sha256 of the decompressed bytes is verified, because
compression differs between copies.
"""

import gzip
import hashlib
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bn_lightning.data.labelled_images import DataError, DataNotFound

# Subfolders that are searched. The first is torchvision's, and downloads are stored
# there.
LAYOUTS = ("FashionMNIST/raw", "raw", "")


@dataclass(frozen=True)
class File:
    """Expected content of one idx file.

    Attributes:
        shape: (N, 28, 28) for images, (N,) for labels.
        sha256: checksum of the decompressed file.
    """

    name: str
    shape: tuple[int, ...]
    sha256: str

    @property
    def size(self) -> int:
        """Number of bytes after decompression.

        Magic number and dimensions take four bytes each, and each value takes one byte.
        """
        return 4 + 4 * len(self.shape) + math.prod(self.shape)


TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"

FULL = (
    File(
        TRAIN_IMAGES,
        (60_000, 28, 28),
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    ),
    File(
        TRAIN_LABELS, (60_000,), "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
    ),
    File(
        TEST_IMAGES,
        (10_000, 28, 28),
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    ),
    File(
        TEST_LABELS, (10_000,), "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
    ),
)
# The first 600 training and 100 test images of each class, in the order of the data
# set.
SAMPLE = (
    File(
        TRAIN_IMAGES,
        (6_000, 28, 28),
        "cf313073c7eb485392848071d5c433571d7166043e971e3345b095cc30518084",
    ),
    File(
        TRAIN_LABELS, (6_000,), "097b93fbcf9bd5bc648b1a457ddc55c9e4ab49afb33f9ecae8ce068399a75e3a"
    ),
    File(
        TEST_IMAGES,
        (1_000, 28, 28),
        "7cee33c3c6414b1b86c25e665a6c4f41584269de3b7cc9768b1d351922845eef",
    ),
    File(TEST_LABELS, (1_000,), "3128d790775889812b73c4f13923559c8b9e281d112c6ea7862acf60a206a909"),
)


def locate(folder: Path, file: File) -> Path:
    """Return the path of a file in a folder, raw or .gz.

    Raises:
        DataNotFound: none of the possible paths exists.
    """
    candidates = [
        folder / layout / name for layout in LAYOUTS for name in (file.name, f"{file.name}.gz")
    ]
    for path in candidates:
        if path.is_file():
            return path
    searched = "".join(f"\n    {path}" for path in candidates)
    raise DataNotFound(f"{file.name} is missing. None of these files exists:{searched}")


def read(path: Path, file: File) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Read and verify one idx file, raw or .gz, and return its values.

    Raises:
        DataError: the file cannot be read, is corrupt, or is not a file of
            Fashion-MNIST.
    """
    expected_magic = 0x0800 + len(file.shape)  # unsigned bytes, number of dimensions
    header = struct.pack(f">I{len(file.shape)}I", expected_magic, *file.shape)
    try:
        # One more byte reveals a file that is too long, without reading all of it.
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            content = stream.read(file.size + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        found = f"truncated or damaged compressed data ({error})"
        raise _corrupt(path, found, f"{file.size:,} bytes") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    if content[:4] != header[:4]:
        raise _corrupt(path, f"magic number 0x{content[:4].hex()}", f"0x{expected_magic:08x}")
    if len(content) != file.size:
        found = f"{len(content):,} bytes" if len(content) < file.size else "more bytes"
        raise _corrupt(path, found, f"{file.size:,} bytes")
    if not content.startswith(header):
        found_shape = struct.unpack(f">{len(file.shape)}I", content[4 : len(header)])
        raise _corrupt(path, f"dimensions {found_shape}", f"{file.shape}")
    values = np.frombuffer(bytearray(content), np.uint8, offset=len(header)).reshape(file.shape)
    if len(file.shape) == 1 and values.max() > 9:
        found = f"label {values.max()} at index {values.argmax()}"
        raise _corrupt(path, found, "labels from 0 to 9")
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != file.sha256:
        raise _corrupt(path, f"sha256 {sha256}", f"{file.sha256} (decompressed)")
    return values


def _corrupt(path: Path, found: str, expected: str) -> DataError:
    return DataError(
        f"{path} is not the expected file of Fashion-MNIST.\n"
        f"    found:    {found}\n"
        f"    expected: {expected}\n"
        "Remove the file, or use another source: --data.source auto|system|download|sample|FOLDER"
    )
