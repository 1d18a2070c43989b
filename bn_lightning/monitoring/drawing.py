"""Figures as images: samples with captions, filters of a convolution, confusion matrix.

Pillow draws them, which TensorBoard requires anyway. Importing matplotlib takes longer
than drawing all figures.
"""

import math
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

INK, PAPER = (30, 30, 30), (255, 255, 255)
LINE = 14  # line height of captions in pixels
# TensorBoard shows an image 350 pixels wide and does not interpolate. Text stays
# legible if it is large and the width is a multiple of 350.
CONFUSION_FONT, CARD_WIDTH = 20, 350


def grid(images: Tensor, captions: Sequence[str], columns: int = 0, size: int = 84) -> Image.Image:
    """Draw images, uint8 (N, H, W) or (N, H, W, 3), in a grid with captions.

    Args:
        captions: caption below each image; it may have several lines.
        columns: images per row; 0 means about as many rows as columns.
        size: longer side of each image in pixels; images are resized without
            interpolation.
    """
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images)) or 1
    rows = math.ceil(len(images) / columns)
    lines = max((caption.count("\n") + 1 for caption in captions), default=0)
    font = _font()
    text_width = max(
        (font.getlength(line) for caption in captions for line in caption.split("\n")), default=0
    )
    width, height = max(size, math.ceil(text_width)) + 10, size + lines * LINE + 8
    sheet = Image.new("RGB", (columns * width, rows * height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = number % columns * width, number // columns * height
        picture = Image.fromarray(image.cpu().numpy()).convert("RGB")
        scale = size / max(picture.size)
        resized = [round(side * scale) for side in picture.size]
        picture = picture.resize(resized, Image.Resampling.NEAREST)
        sheet.paste(picture, (left + (width - picture.width) // 2, top + 4))
        draw.multiline_text((left + 5, top + size + 5), caption, INK, font, spacing=3)
    return sheet


def filters(weight: Tensor) -> Image.Image:
    """Draw the filters of a convolution, (K, C, h, w), one image for each k and c.

    Positive weights are red, negative weights are blue, and zero is white.
    """
    flat = weight.detach().float().flatten(0, 1).cpu()  # (K * C, h, w)
    names = [
        f"{k}" if weight.size(1) == 1 else f"{k}, {c}"
        for k in range(len(weight))
        for c in range(weight.size(1))
    ]
    return grid(_diverging(flat / flat.abs().amax().clamp(min=1e-12)), names, columns=8)


def confusion(matrix: Tensor, names: Sequence[str]) -> Image.Image:
    """Draw a confusion matrix: counts (C, C), a row per true class, a column per predicted class.

    The shade of a cell shows its fraction of the row.
    """
    font = _font(CONFUSION_FONT)
    line = CONFUSION_FONT + 4
    margin = math.ceil(max(font.getlength(text) for text in (*names, "predicted"))) + 14
    cell = math.ceil(font.getlength(f"{int(matrix.max())}")) + 8
    side = math.ceil((margin + cell * len(names)) / CARD_WIDTH) * CARD_WIDTH
    cell = (side - margin) // len(names)
    sheet = Image.new("RGB", (side, side), PAPER)
    draw = ImageDraw.Draw(sheet)

    draw.text((margin - 8, 4), "predicted", INK, font, anchor="ra")
    draw.text((margin - 8, margin - 8), "true", INK, font, anchor="rs")
    for index, name in enumerate(names):
        middle = margin + index * cell + cell // 2
        draw.text((margin - 8, middle), name, INK, font, anchor="rm")
        upright = Image.new("RGB", (margin, line), PAPER)
        ImageDraw.Draw(upright).text((8, line // 2), name, INK, font, anchor="lm")
        sheet.paste(upright.rotate(90, expand=True), (middle - line // 2, 0))

    fractions = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    for row in range(len(names)):
        for column in range(len(names)):
            left, top = margin + column * cell, margin + row * cell
            fraction, count = float(fractions[row, column]), int(matrix[row, column])
            # Without the square root only the diagonal would be visible.
            shade = fraction**0.5 * torch.tensor([225.0, 155.0, 75.0])
            colour = tuple(int(255 - part) for part in shade)
            draw.rectangle((left, top, left + cell - 2, top + cell - 2), colour)
            if count:
                ink = PAPER if fraction > 0.35 else INK
                centre = left + cell // 2, top + cell // 2
                draw.text(centre, f"{count}", ink, font, anchor="mm")
    return sheet


def _diverging(values: Tensor) -> Tensor:
    """Return the colours, uint8 (..., 3), of values from -1 to 1."""
    positive = values.clamp(min=0).unsqueeze(-1)
    negative = (-values).clamp(min=0).unsqueeze(-1)
    absorbed = positive * torch.tensor([0.2, 0.8, 0.85]) + negative * torch.tensor([0.85, 0.6, 0.2])
    return (255 * (1 - absorbed)).to(torch.uint8)


def _font(size: int = 11) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)
