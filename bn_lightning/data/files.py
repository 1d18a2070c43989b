"""The four files of Fashion-MNIST: what each must hold, and reading them with proof.

Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, https://arxiv.org/abs/1708.07747) is in the idx format
of MNIST. Each file is checked by the sha256 of its decompressed bytes, since copies differ in how
they are compressed.
"""

import gzip
import hashlib
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bn_lightning.errors import UserError

# Folders within a folder. The first is torchvision's, where downloads are kept.
LAYOUTS = ("FashionMNIST/raw", "raw", "")


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
# The first 600 training and 100 test images of each class, in the data set's order.
SAMPLED = (
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


class DataError(UserError):
    """Data that are missing, broken, or not Fashion-MNIST."""


class NotThere(DataError):
    """A folder, a file or a mirror that is not there, where another source may have it."""


def locate(folder: Path, file: File) -> Path:
    candidates = [
        folder / layout / name for layout in LAYOUTS for name in (file.name, f"{file.name}.gz")
    ]
    for path in candidates:
        if path.is_file():
            return path
    raise NotThere(
        f"{file.name} is missing: none of\n"
        + "".join(f"    {path}\n" for path in candidates)
        + "is there."
    )


def read(path: Path, file: File) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Read one idx file, raw or .gz, and check it before anything is made of it."""
    expected_magic = 0x0800 + len(file.shape)  # unsigned bytes, number of dimensions
    header = struct.pack(f">I{len(file.shape)}I", expected_magic, *file.shape)
    try:
        # One byte more than expected, so that a longer file shows without being read whole.
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            content = stream.read(file.size + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _broken(
            path, f"compressed data that are cut off or damaged ({error})", f"{file.size:,} bytes"
        ) from error
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
        raise _broken(
            path, f"a label {values.max()}, at index {values.argmax()}", "labels from 0 to 9"
        )
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != file.sha256:
        raise _broken(path, f"sha256 {sha256}", f"{file.sha256} (decompressed)")
    return values


def _broken(path: Path, found: str, expected: str) -> DataError:
    return DataError(
        f"{path} is not the file of Fashion-MNIST.\n    found:    {found}\n    expected: {expected}\n"
        "Remove it, or name another source: --data.source auto|system|download|sample|FOLDER"
    )
