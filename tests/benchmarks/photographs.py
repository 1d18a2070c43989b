"""JPEG files that compress like photographs. This module is not a command."""

from pathlib import Path

import numpy as np
from PIL import Image

CANVAS = 1024


def write_photographs(
    folder: Path, count: int, width: int = 500, height: int = 375, classes: int = 10
) -> list[Path]:
    """Write colour JPEGs into `folder/CLASS/`, and return their paths.

    Each is a part of one large picture of noise whose spectrum is that of photographs:
    the amplitude is inversely proportional to the frequency. The classes differ in
    brightness.
    """
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(CANVAS)[:, None], np.fft.rfftfreq(CANVAS))
    frequency[0, 0] = np.inf
    noise = rng.standard_normal((3, CANVAS, CANVAS))
    canvas = np.fft.irfft2(np.fft.rfft2(noise) / frequency, (CANVAS, CANVAS))
    # The channels of photographs are similar.
    canvas = (0.3 * canvas + canvas.mean(0)).transpose(1, 2, 0)
    canvas /= canvas.std()
    paths = []
    for index in range(count):
        label = index % classes
        y, x = rng.integers(CANVAS - height), rng.integers(CANVAS - width)
        pixels = 45 * canvas[y : y + height, x : x + width] + 60 + 130 * label / classes
        path = folder / f"class {label}" / f"{index:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        paths.append(path)
    return paths
