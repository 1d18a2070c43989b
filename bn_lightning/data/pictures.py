"""Reading of a user's image files: plainly, or converted to the style of Fashion-MNIST.

The steps of the conversion are those of section 2 of Xiao, Rasul and Vollgraf 2017,
https://arxiv.org/abs/1708.07747: trim the edges that have the colour of the corners,
resize the longer side to 28 pixels, sharpen, centre, invert, convert to grey. There are
three differences. Resizing averages pixels instead of dropping rows and columns.
Sharpening has half the strength. An image is not trimmed if the object fills it. With
these changes, enlarged images of the data set are converted back to the originals.
"""

import itertools
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFilter, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from bn_lightning.errors import RunFailed, UserError

SIDE = 28
# An image is not trimmed if its object takes at least this fraction of the longer side.
# In all 70,000 images of the data set, the object takes at least 25 of 28 pixels.
FILLED = 0.85
# A pixel belongs to the background if the distance of its colour from the background
# colour is at most this fraction of the largest distance between two colours.
TOLERANCE = 0.05
# Pillow can identify the first five of these formats, but not read them. To read EPS,
# it runs Ghostscript.
UNSUPPORTED = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS"}
# A picture with more pixels than a square of this side (4.2 megapixels) is shrunk before
# it is converted. The conversion to the style of Fashion-MNIST needs 36 bytes per pixel.
LARGE = 2048
# A large picture is shrunk in bands, each of which becomes this number of rows.
BAND = 16


# These two are not constants, because they make Pillow import all of its plugins.
@cache
def formats() -> dict[str, str]:
    """Return the name of the image format of each supported file suffix."""
    return {
        suffix: name
        for suffix, name in Image.registered_extensions().items()
        if name in {*Image.OPEN} - UNSUPPORTED
    }


@cache
def _format_names() -> tuple[str, ...]:
    # Pillow tries the formats in this order. For some of them, this takes as long as
    # reading a small picture.
    return tuple(dict.fromkeys(["JPEG", "PNG", *sorted(formats().values())]))


class PictureError(UserError):
    """A file cannot be read as an image, or the image has a single colour."""


@dataclass(frozen=True)
class Picture:
    """An image that was read.

    Attributes:
        path: the image file.
        pixels: uint8 (H, W) or (C, H, W). In the style of Fashion-MNIST, it is a bright
            object on a black background.
        inverted: whether brightness was inverted.
    """

    path: Path
    pixels: Tensor
    inverted: bool


def find(names: Iterable[str]) -> list[Path]:
    """Return the image files that match files, folders and patterns such as `*.jpg`.

    Folders are searched recursively. The files of each folder or pattern are sorted,
    and duplicates are removed.

    Raises:
        UserError: no file was found.
    """
    names = list(names)
    found: dict[Path, None] = {}
    for name in filter(None, names):
        found |= dict.fromkeys(sorted(_find_one(name)))
    if not found:
        raise UserError(
            f"No images were found in {', '.join(names)}.\n"
            "Use files, folders or patterns: --data.images a.png folder/ 'more/*.jpg'"
        )
    return list(found)


def _find_one(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        files = (file for file in path.rglob("*") if file.suffix.lower() in formats())
    # Not every shell expands patterns.
    elif any(character in name for character in "*?[") and not path.exists():
        files = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
    else:
        return [path]
    return [file for file in files if file.is_file()]


def read(path: Path, invert: bool | None = None) -> Picture:
    """Read an image file and convert it to the style of the data set.

    An image of 28x28 pixels is neither trimmed nor resized. Transparency becomes white.
    Only the first frame of an animation is read.

    Args:
        invert: whether to invert brightness. By default, an image with a bright border
            is inverted, for example a photo on a white background, because the images
            of the data set have black backgrounds.

    Raises:
        PictureError: the file does not exist, is not a readable image, or has a single
            colour.
    """
    picture = _open(path, side=LARGE // 2)
    colours = np.asarray(picture, dtype=np.float32)
    background = np.median(colours[[0, 0, -1, -1], [0, -1, 0, -1]], axis=0)
    distance = np.linalg.norm(colours - background, axis=2)
    is_object = distance > TOLERANCE * np.sqrt(3) * 255
    if not is_object.any():
        raise PictureError(f"{path}: the image has a single colour")
    if invert is None:
        grey = np.asarray(picture.convert("L"))
        border = np.concatenate([grey[0], grey[-1], grey[1:-1, 0], grey[1:-1, -1]])
        # This decision is correct for all 70,000 images of the data set, and for their
        # inverted copies.
        invert = bool(border.mean() > 127)
    if picture.size != (SIDE, SIDE):
        picture = _trim_and_fit(picture, is_object, background)
    grey = np.asarray(picture.convert("L"))
    return Picture(path, torch.from_numpy(255 - grey if invert else grey.copy()), invert)


def read_as(path: Path, size: tuple[int, int], channels: int, invert: bool = False) -> Picture:
    """Read an image file in grey or RGB, with a given size.

    The shorter side is resized, and the centre is cropped.

    Args:
        size: width and height in pixels.
        channels: 1 or 3.
        invert: whether to invert brightness.

    Raises:
        PictureError: the file does not exist, or is not a readable image.
        UserError: there is another number of channels.
    """
    if channels not in (1, 3):
        raise UserError(
            f"Image files are read with 1 or 3 channels, but the network is for {channels}. Remove "
            "--data.images to predict the test set."
        )
    picture = _open(path, side=2 * max(size))
    picture = ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(picture.convert("L" if channels == 1 else "RGB")))
    pixels = pixels if channels == 1 else pixels.permute(2, 0, 1).contiguous()
    return Picture(path, 255 - pixels if invert else pixels, invert)


def read_all(
    paths: Sequence[Path], read_one: Callable[[Path], Picture] = read
) -> tuple[list[Picture], int]:
    """Read image files, and return the images and the number of files that failed.

    Each file that cannot be read is reported on stderr.

    Raises:
        RunFailed: no file can be read.
    """
    pictures = []
    for path in tqdm(paths, "reading", disable=None, leave=False):
        try:
            pictures.append(read_one(path))
        except PictureError as error:
            tqdm.write(f"cannot read {error}", file=sys.stderr)
    if not pictures:
        raise RunFailed("No image could be read. The reasons are listed above.")
    return pictures, len(paths) - len(pictures)


def _open(path: Path, side: int) -> Image.Image:
    """Return the image of a file in RGB. A large image is shrunk.

    Args:
        side: number of pixels that is enough for each side of the image.

    Raises:
        PictureError: the file does not exist, or is not a readable image.
    """
    try:
        with warnings.catch_warnings():
            # Pillow's warnings about unusual tags are of no use to the user.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_format_names()) as file:
                # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size. This needs less
                # memory and time. Other formats ignore it.
                file.draft(None, (side, side))
                file.load()
                picture = _shrunk(file, max(LARGE, 2 * side) ** 2)
                orientation = _orientation(file)
        # Without this, Pillow would read the EXIF data again.
        picture.info.clear()
        picture.getexif()[ExifTags.Base.Orientation] = orientation
        ImageOps.exif_transpose(picture, in_place=True)
        return picture
    except FileNotFoundError:
        raise PictureError(f"{path}: the file does not exist") from None
    except UnidentifiedImageError as error:
        raise PictureError(f"{path}: not a readable image") from error
    # Pillow's decoders raise exceptions of many classes, such as SyntaxError,
    # struct.error and EOFError.
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise PictureError(f"{path}: {reason or str(error) or type(error).__name__}") from error


def _shrunk(picture: Image.Image, max_pixels: int) -> Image.Image:
    """Return an image in RGB, divided by the smallest integer that makes it small enough."""
    width, height = picture.size
    for factor in itertools.count(1):
        size = math.ceil(width / factor), math.ceil(height / factor)
        if math.prod(size) <= max_pixels:
            break
    white = _white(picture)
    if factor == 1:
        return _to_rgb(picture, white)
    # Only one band at a time is converted, because a conversion may need many times the
    # memory of the image.
    small, rows = Image.new("RGB", size), BAND * factor
    for top in range(0, height, rows):
        band = picture.crop((0, top, width, min(top + rows, height)))
        small.paste(_to_rgb(band, white).reduce(factor), (0, top // factor))
    return small


def _orientation(picture: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8. If it cannot be read, it is 1: upright."""
    try:
        return int(picture.getexif().get(ExifTags.Base.Orientation, 1))
    # Broken EXIF data raise exceptions of many classes. The pixels are intact.
    except Exception:
        return 1


def _white(picture: Image.Image) -> int:
    """Return the value of white: for 32-bit grey, the smallest usual one that fits."""
    if picture.mode not in ("I", "F"):
        return 65_535 if picture.mode.startswith("I;16") else 255
    # Pillow's type hints include several bands, of which these images have one.
    _, largest = cast(tuple[float, float], picture.getextrema())
    return next((white for white in (1, 255) if largest <= white), 65_535)


def _to_rgb(picture: Image.Image, white: int) -> Image.Image:
    # Pillow would clip 16-bit and 32-bit grey values at 255.
    if picture.mode.startswith(("I", "F")):
        values = np.asarray(picture, dtype=np.float64)
        picture = Image.fromarray((values / white * 255).clip(0, 255).round().astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _trim_and_fit(
    picture: Image.Image, is_object: np.ndarray, background: np.ndarray
) -> Image.Image:
    """Trim an image to its object, resize it to 28 pixels, sharpen and centre it."""
    rows, columns = np.flatnonzero(is_object.any(1)), np.flatnonzero(is_object.any(0))
    box = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    if max(box[2] - box[0], box[3] - box[1]) < FILLED * max(picture.size):
        picture = picture.crop(box)
    scale = SIDE / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    picture = picture.filter(ImageFilter.UnsharpMask(radius=1, percent=50, threshold=0))
    canvas = Image.new("RGB", (SIDE, SIDE), tuple(int(value) for value in background))
    canvas.paste(picture, ((SIDE - width) // 2, (SIDE - height) // 2))
    return canvas
