"""A person's own pictures, made like those of Fashion-MNIST.

The recipe is the data set's own, section 2 of Xiao, Rasul and Vollgraf 2017, https://arxiv.org/abs/1708.07747: trim the
edges that have the colour of the corners, bring the longer side to 28 pixels, sharpen, centre, invert, take the grey of
it. It differs in three points: rows and columns are averaged and not left out, it sharpens half as much, and a picture
that is filled by what it shows is not trimmed. So images of the data set that were resized come back as what they were.
"""

import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from bn_lightning.errors import RunFailed, UserError

SIDE = 28
FILLED = (
    0.85  # of the longer side; what the data set's 70,000 images show fills 25 of 28 pixels or more
)
CLOSE = 0.05  # of the greatest distance of two colours: the paper's "close to the color of the corner pixels"
# Of what Pillow can read by itself: the first are only named by it, and EPS is a program that Ghostscript would run.
NOT_READ = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS"}


@cache  # not when this is imported: Pillow then loads all that it can read
def formats() -> dict[str, str]:
    """The formats that are read, by suffix."""
    return {
        suffix: name
        for suffix, name in Image.registered_extensions().items()
        if name in {*Image.OPEN} - NOT_READ
    }


class PictureError(UserError):
    """A file that cannot be read as a picture, or shows nothing."""


@dataclass(frozen=True)
class Picture:
    """One picture as the network is given it: uint8 (28, 28), a bright thing on black."""

    path: Path
    pixels: Tensor
    inverted: bool


def find(given: Iterable[str]) -> list[Path]:
    """The files that are meant: files, all pictures of folders and of what lies in them, patterns such as `*.jpg`.

    Each comes once, in the order in which they are given; those of a folder by name.

    Raises:
        UserError: nothing is left.
    """
    found: dict[Path, None] = {}
    for name in given:
        path = Path(name)
        if name and path.is_dir():
            here = [
                file
                for file in path.rglob("*")
                if file.suffix.lower() in formats() and file.is_file()
            ]
        elif (
            any(sign in name for sign in "*?[") and not path.exists()
        ):  # a shell that leaves patterns alone
            matching = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
            here = [file for file in matching if file.is_file()]
        else:
            here = [path] if name else []
        found |= dict.fromkeys(sorted(here))
    if not found:
        raise UserError(
            f"There is no picture in {', '.join(given)}.\n"
            "Files, folders and patterns are taken: --data.images a.png folder/ 'more/*.jpg'"
        )
    return list(found)


def read(path: Path, invert: bool | None = None) -> Picture:
    """Read a picture and make it like those of the data set.

    One of 28x28 pixels is taken as it is, but for its colours and its inversion. Transparency is filled with white; of
    an animation the first picture counts.

    Args:
        invert: whether dark and bright change places; None does so where the border is bright, as in a photograph on a
            white ground: the pictures of the data set lie on black.

    Raises:
        PictureError: no such file, none that can be read as a picture, or nothing but one colour in it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd tags
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=sorted(set(formats().values()))) as file:
                picture = _to_rgb(ImageOps.exif_transpose(file))
    except FileNotFoundError:
        raise PictureError(f"{path}: there is no such file") from None
    except (
        Exception
    ) as error:  # Pillow raises whatever its decoders do: SyntaxError, struct.error, EOFError
        reason = (
            "not a picture that can be read"
            if isinstance(error, UnidentifiedImageError)
            else str(error)
        )
        raise PictureError(f"{path}: {reason or type(error).__name__}") from error
    colours = np.asarray(picture, dtype=np.float32)
    ground = np.median(colours[[0, 0, -1, -1], [0, -1, 0, -1]], axis=0)
    shown = np.linalg.norm(colours - ground, axis=2) > CLOSE * np.sqrt(3) * 255
    if not shown.any():
        raise PictureError(f"{path}: it shows nothing but one colour")
    if invert is None:
        grey = np.asarray(picture.convert("L"))
        border = np.concatenate([grey[0], grey[-1], grey[1:-1, 0], grey[1:-1, -1]])
        invert = bool(
            border.mean() > 127
        )  # right for all 70,000 images of the data set, inverted or not
    if picture.size != (SIDE, SIDE):
        picture = _trim_and_fit(picture, shown, ground)
    grey = np.asarray(picture.convert("L"))
    return Picture(path, torch.from_numpy(255 - grey if invert else grey.copy()), invert)


def read_all(paths: Sequence[Path], invert: bool | None = None) -> tuple[list[Picture], int]:
    """Those that can be read, and how many cannot, each of which is named on stderr.

    Raises:
        RunFailed: there is none that can be read.
    """
    found = []
    for path in tqdm(paths, "reading", disable=None, leave=False):
        try:
            found.append(read(path, invert))
        except PictureError as error:
            tqdm.write(f"not read: {error}", file=sys.stderr)
    if not found:
        raise RunFailed(f"None of {len(paths)} pictures could be read; they are named above.")
    return found, len(paths) - len(found)


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith(
        ("I", "F")
    ):  # 16 and 32 bits of grey, which Pillow would cut off at 255
        values = np.asarray(picture, dtype=np.float64)
        most = next((most for most in (1, 255, 65_535) if values.max() <= most), 65_535)
        most = 65_535 if picture.mode.startswith("I;16") else most
        picture = Image.fromarray((values / most * 255).clip(0, 255).round().astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _trim_and_fit(picture: Image.Image, shown: np.ndarray, ground: np.ndarray) -> Image.Image:
    """Trimmed to what is shown, the longer side brought to 28 pixels, sharpened, and in the middle of its ground."""
    rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
    box = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    if max(box[2] - box[0], box[3] - box[1]) < FILLED * max(picture.size):
        picture = picture.crop(box)
    scale = SIDE / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    picture = picture.filter(ImageFilter.UnsharpMask(radius=1, percent=50, threshold=0))
    canvas = Image.new("RGB", (SIDE, SIDE), tuple(int(part) for part in ground))
    canvas.paste(picture, ((SIDE - width) // 2, (SIDE - height) // 2))
    return canvas
