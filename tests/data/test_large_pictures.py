"""Large picture files are shrunk while they are read, with bounded memory."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from bn_lightning.data import pictures
from tests.conftest import run_here

STYLES = {
    "fashion": pictures.read,
    "plain": lambda path: pictures.read_as(path, (64, 64), 3),
}


def noise(size, mode="RGB"):
    channels = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], channels), np.uint8)
    return Image.frombytes(mode, size, values.tobytes())


def palette(transparency):
    picture = noise((203, 157)).quantize(8)
    picture.info["transparency"] = transparency
    return picture


def grey_that_is_brightest_at_the_end(dtype):
    """Return grey values of at most 1, with 200 in the last row only."""
    values = np.random.default_rng(0).uniform(0, 1, (157, 203))
    values[-1] = 200
    return Image.fromarray(values.astype(dtype))


KINDS = {
    **{mode: noise((203, 157), mode) for mode in ("L", "LA", "RGB", "RGBA", "CMYK")},
    "palette": palette(bytes([255, 0, 128])),
    "transparent colour of a palette": palette(3),
    "16 bits": Image.fromarray(np.arange(203 * 157, dtype=np.uint16).reshape(157, 203)),
    "float": grey_that_is_brightest_at_the_end(np.float32),
    "int": grey_that_is_brightest_at_the_end(np.int32),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_that_is_shrunk_in_bands_has_the_pixels_of_the_whole(kind):
    picture = KINDS[kind]
    small = pictures._shrunk(picture, 68 * 53)  # a third, rounded up
    expected = pictures._shrunk(picture, 203 * 157).reduce(3)
    assert small.size == (68, 53)
    assert small.tobytes() == expected.tobytes()


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_large_picture_is_turned_upright(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(pictures, "LARGE", 60)
    picture = noise((6, 4)).resize((600, 400), Image.Resampling.BICUBIC)
    for orientation in range(1, 9):
        picture.getexif()[0x0112] = orientation
        path = tmp_path / f"{orientation}.{suffix}"
        picture.save(path, exif=picture.getexif())
        upright = ImageOps.exif_transpose(picture)
        expected = np.asarray(ImageOps.fit(upright, (30, 24)), dtype=int).transpose(2, 0, 1)
        pixels = pictures.read_as(path, (30, 24), 3).pixels.numpy()
        assert np.abs(pixels - expected).mean() < 3, orientation


def test_a_jpeg_is_decoded_at_a_smaller_scale(tmp_path, monkeypatch):
    scales = []

    def record(picture, max_pixels):
        scales.append(picture.size)
        return picture.convert("RGB")

    monkeypatch.setattr(pictures, "_shrunk", record)
    noise((500, 375)).save(tmp_path / "a.jpg")
    for side in (20, 40, 64, 100, 400):
        pictures.read_as(tmp_path / "a.jpg", (side, side), 3)
    # At least twice the size that is needed, but never enlarged.
    assert scales == [(63, 47), (125, 94), (250, 188), (500, 375), (500, 375)]
    # The style of Fashion-MNIST needs the details of a small object.
    pictures.read(tmp_path / "a.jpg")
    assert scales[-1] == (500, 375)


def peak_of(function, *arguments):
    """Return the peak memory of this process during a call, in MB."""
    Path("/proc/self/clear_refs").write_text("5")
    function(*arguments)
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def photograph(width, height, mode="RGB"):
    picture = Image.new("RGB", (width, height), "white")
    box = 0.3 * width, 0.2 * height, 0.7 * width, 0.8 * height
    ImageDraw.Draw(picture).ellipse(box, (60, 30, 120))
    return picture.convert(mode)


only_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


@only_linux
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_the_memory_for_a_picture_of_16_megapixels_is_bounded(tmp_path, suffix):
    small, large = tmp_path / f"small.{suffix}", tmp_path / f"large.{suffix}"
    photograph(98, 66).save(small)
    photograph(4899, 3267).save(large, compress_level=1)
    for style, read in STYLES.items():
        extra = peak_of(read, large) - peak_of(read, small)
        # Decoding a JPEG at its full size takes 64 MB, and converting it 64 more.
        limit = {"fashion": 250, "plain": 25 if suffix == "jpg" else 100}[style]
        assert extra < limit, style


LARGE_FILES = {
    "baseline.jpg": {},
    "progressive.jpg": {"progressive": True},
    "rgb.png": {"compress_level": 1},
    "rgba.png": {"compress_level": 1},
}


@pytest.mark.slow
@only_linux
def test_predict_needs_at_most_300_mb_more_for_50_megapixels(tmp_path, trained):
    picture = photograph(8660, 5774)
    for name, options in LARGE_FILES.items():
        picture.convert("RGBA" if name == "rgba.png" else "RGB").save(tmp_path / name, **options)
    del picture
    photograph(87, 58).save(tmp_path / "small.png")
    checkpoint = trained[0] / "checkpoints/best.ckpt"

    def predict(name):
        images = ("--data.images", name, "--format", "csv")
        done = run_here("predict", "--ckpt_path", checkpoint, *images, cwd=tmp_path)
        assert done.stdout.count("\n") == 2

    predict("small.png")  # imports
    small = peak_of(predict, "small.png")
    for name in LARGE_FILES:
        assert peak_of(predict, name) - small < 300, name
        plain = peak_of(STYLES["plain"], tmp_path / name)
        assert plain - small < 300, name
