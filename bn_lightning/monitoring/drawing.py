"""Figures as images: samples with captions, filters of a convolution, a confusion matrix.

They are drawn with Pillow, which TensorBoard needs anyway. Importing matplotlib would take longer
than drawing all of them.
"""

import math
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

INK, PAPER = (30, 30, 30), (255, 255, 255)
LINE = 14  # pixels from one line of text to the next


def grid(images: Tensor, captions: Sequence[str], columns: int = 0, size: int = 84) -> Image.Image:
    """Draw images, uint8 (N, H, W) or (N, H, W, 3), in rows, each with its caption below.

    Args:
        captions: one for each image; it may have several lines.
        columns: images in a row; 0 makes about as many rows as columns.
        size: pixels of an image's longer side. Pixels of the image keep sharp edges.
    """
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images)) or 1
    rows = math.ceil(len(images) / columns)
    lines = max((caption.count("\n") + 1 for caption in captions), default=0)
    font = _font()
    texts = max(
        (font.getlength(line) for caption in captions for line in caption.split("\n")), default=0
    )
    width, height = max(size, math.ceil(texts)) + 10, size + lines * LINE + 8
    sheet = Image.new("RGB", (columns * width, rows * height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = number % columns * width, number // columns * height
        picture = Image.fromarray(image.cpu().numpy()).convert("RGB")
        shrunk = size / max(picture.size)
        picture = picture.resize(
            [round(side * shrunk) for side in picture.size], Image.Resampling.NEAREST
        )
        sheet.paste(picture, (left + (width - picture.width) // 2, top + 4))
        draw.multiline_text((left + 5, top + size + 5), caption, INK, font, spacing=3)
    return sheet


def filters(weight: Tensor) -> Image.Image:
    """Draw the filters of a convolution, (K, C, h, w), with one image for each k and c.

    Positive weights are red, negative ones blue, and 0 is white.
    """
    flat = weight.detach().float().flatten(0, 1).cpu()
    names = [
        f"{k}" if weight.size(1) == 1 else f"{k}, {c}"
        for k in range(len(weight))
        for c in range(weight.size(1))
    ]
    return grid(_diverging(flat / flat.abs().amax().clamp(min=1e-12)), names, columns=8)


def confusion(matrix: Tensor, names: Sequence[str]) -> Image.Image:
    """Draw a confusion matrix: counts (C, C), rows by target and columns by prediction.

    The shade of a square shows its share of the row.
    """
    side, font = 44, _font()
    margin = math.ceil(max(font.getlength(name) for name in names)) + 12
    whole = margin + side * len(names)
    sheet = Image.new("RGB", (whole + 6, whole + 6), PAPER)
    draw = ImageDraw.Draw(sheet)
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    for row, name in enumerate(names):
        at = margin + row * side + side // 2
        draw.text((margin - 6, at), name, INK, font, anchor="rm")
        upright = Image.new("RGB", (margin, LINE), PAPER)
        ImageDraw.Draw(upright).text((6, LINE // 2), name, INK, font, anchor="lm")
        sheet.paste(upright.rotate(90, expand=True), (at - LINE // 2, 0))
        for column in range(len(names)):
            share, count = float(shares[row, column]), int(matrix[row, column])
            left, top = margin + column * side, margin + row * side
            # With the share itself only the diagonal would be visible.
            shade = share**0.5 * torch.tensor([225.0, 155.0, 75.0])
            colour = tuple(int(255 - part) for part in shade)
            draw.rectangle((left, top, left + side - 2, top + side - 2), colour)
            if count:
                ink = PAPER if share > 0.35 else INK
                draw.text((left + side // 2, at), f"{count:,}", ink, font, anchor="mm")
    draw.text((margin - 6, margin - 8), "truth", INK, font, anchor="rs")
    draw.text((margin - 12, 6), "guess", INK, font, anchor="ra")
    return sheet


def _diverging(values: Tensor) -> Tensor:
    """Return colours, uint8 (..., 3), of values from -1 to 1."""
    above, below = values.clamp(min=0).unsqueeze(-1), (-values).clamp(min=0).unsqueeze(-1)
    fading = above * torch.tensor([0.2, 0.8, 0.85]) + below * torch.tensor([0.85, 0.6, 0.2])
    return (255 * (1 - fading)).to(torch.uint8)


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=11)
