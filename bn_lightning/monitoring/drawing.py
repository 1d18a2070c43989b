"""Figures as images: samples with captions, filters of a convolution, confusion matrix.

Pillow draws them, which TensorBoard requires anyway. Importing matplotlib takes longer
than drawing all figures.
"""

import math
import unicodedata
from collections.abc import Sequence
from functools import cache

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from bn_lightning.training.confusion import describe_selection, reported_classes, short_name

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

INK, PAPER = (30, 30, 30), (255, 255, 255)
LINE = 14  # line height of captions in pixels
# TensorBoard shows an image 350 pixels wide and does not interpolate. Text stays
# legible if it is large and the width is a multiple of 350.
CONFUSION_FONT, CARD_WIDTH = 20, 350
MAX_FILTERS = 64


def legible(name: str, label: int) -> str:
    """Return the name of a class as a figure can show it.

    Pillow's font has few characters besides ASCII. Accents are removed, and other
    characters that the font lacks become question marks. A name of which no letter
    remains becomes `class LABEL`. Long names are shortened in the middle.
    """
    decomposed = unicodedata.normalize("NFKD", name)
    plain = "".join(c for c in decomposed if not unicodedata.combining(c))
    text = "".join(c if _has_glyph(c) else "?" for c in short_name(plain))
    if "?" in text and not any(c.isalpha() for c in text):
        return f"class {label}"
    return text


@cache
def _has_glyph(character: str) -> bool:
    # U+FFFF is no character, so the font draws the sign for a missing one.
    font = _font()
    return bytes(font.getmask(character)) != bytes(font.getmask("\uffff"))


def grid(images: Tensor, captions: Sequence[str], columns: int = 0, size: int = 84) -> Image.Image:
    """Draw images, uint8 (N, H, W) or (N, H, W, 3), in a grid with captions.

    Args:
        captions: caption below each image; it may have several lines.
        columns: images per row; 0 means about as many rows as columns.
        size: longer side of each image in pixels, at most; small images are enlarged to
            a multiple of their size, without interpolation.
    """
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images)) or 1
    rows = math.ceil(len(images) / columns)
    pictures = [_resized(Image.fromarray(image.cpu().numpy()), size) for image in images]
    shown_width, shown_height = pictures[0].size if pictures else (size, size)
    lines = max((caption.count("\n") + 1 for caption in captions), default=0)
    font = _font()
    text_width = max(
        (font.getlength(line) for caption in captions for line in caption.split("\n")), default=0
    )
    width = max(shown_width, math.ceil(text_width)) + 10
    height = shown_height + lines * LINE + 8
    sheet = Image.new("RGB", (columns * width, rows * height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = number % columns * width, number // columns * height
        sheet.paste(picture, (left + (width - shown_width) // 2, top + 4))
        draw.multiline_text((left + 5, top + shown_height + 5), caption, INK, font, spacing=3)
    return sheet


def _resized(picture: Image.Image, size: int) -> Image.Image:
    longest = max(picture.size)
    scale = size // longest or size / longest
    width, height = (max(1, round(side * scale)) for side in picture.size)
    # Pixels of a small image stay visible. A large image would lose most of them.
    resampling = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
    return picture.convert("RGB").resize((width, height), resampling)


def filters(weight: Tensor) -> Image.Image:
    """Draw the filters of a layer, (K, C, h, w), in colour if they have three channels.

    Otherwise there is one grey image for each filter and channel. Zero is grey, and the
    largest absolute weight is white or black, or the full intensity of its colour. Only
    the first `MAX_FILTERS` images are drawn.
    """
    num_filters, channels = weight.shape[:2]
    values = weight.detach().float().cpu()
    values = 0.5 + 0.5 * values / values.abs().amax().clamp(min=1e-12)
    pixels = (255 * values).round().to(torch.uint8)
    kind, names, columns = "filters", [f"{k}" for k in range(num_filters)], 8
    images = pixels.permute(0, 2, 3, 1) if channels == 3 else pixels.flatten(0, 1)
    if channels not in (1, 3):
        kind, columns = "pairs of filter and channel", min(channels, 8)
        names = [f"{k}, {c}" for k in range(num_filters) for c in range(channels)]
    sheet = grid(images[:MAX_FILTERS], names[:MAX_FILTERS], columns)
    if len(images) <= MAX_FILTERS:
        return sheet
    return titled(sheet, f"The first {MAX_FILTERS} of {len(images)} {kind}")


def confusion(matrix: Tensor, names: Sequence[str]) -> Image.Image:
    """Draw a confusion matrix: counts (C, C), a row per true class, a column per predicted class.

    The shade of a cell shows its fraction of the row. If there are many classes, those
    with the lowest accuracy are shown, and the last column counts the predictions of all
    other classes.
    """
    shown = reported_classes(matrix)
    font = _font(CONFUSION_FONT)
    line = CONFUSION_FONT + 4
    rows = [names[label] for label in shown]
    counts, columns = matrix[shown][:, shown], rows
    totals = matrix[shown].sum(1, keepdim=True)
    if len(shown) < len(matrix):
        counts = torch.cat([counts, totals - counts.sum(1, keepdim=True)], 1)
        columns = [*rows, "other classes"]
    margin = math.ceil(max(font.getlength(text) for text in (*columns, "predicted"))) + 14
    cell = math.ceil(font.getlength(f"{int(counts.max())}")) + 8
    side = math.ceil((margin + cell * len(columns)) / CARD_WIDTH) * CARD_WIDTH
    cell = (side - margin) // len(columns)
    # There is no row for the last column of a selection.
    height = side - cell * (len(columns) - len(rows))
    sheet = Image.new("RGB", (side, height), PAPER)
    draw = ImageDraw.Draw(sheet)

    draw.text((margin - 8, 4), "predicted", INK, font, anchor="ra")
    draw.text((margin - 8, margin - 8), "true", INK, font, anchor="rs")
    for index, name in enumerate(columns):
        middle = margin + index * cell + cell // 2
        if index < len(rows):
            draw.text((margin - 8, middle), name, INK, font, anchor="rm")
        upright = Image.new("RGB", (margin, line), PAPER)
        ImageDraw.Draw(upright).text((8, line // 2), name, INK, font, anchor="lm")
        sheet.paste(upright.rotate(90, expand=True), (middle - line // 2, 0))

    fractions = counts / totals.clamp(min=1)
    for row in range(len(rows)):
        for column in range(len(columns)):
            left, top = margin + column * cell, margin + row * cell
            fraction, count = float(fractions[row, column]), int(counts[row, column])
            # Without the square root only the diagonal would be visible.
            shade = fraction**0.5 * torch.tensor([225.0, 155.0, 75.0])
            colour = tuple(int(255 - part) for part in shade)
            draw.rectangle((left, top, left + cell - 2, top + cell - 2), colour)
            if count:
                ink = PAPER if fraction > 0.35 else INK
                centre = left + cell // 2, top + cell // 2
                draw.text(centre, f"{count}", ink, font, anchor="mm")
    note = describe_selection(matrix)
    return titled(sheet, note, CONFUSION_FONT) if note else sheet


def titled(sheet: Image.Image, title: str, font_size: int = 11) -> Image.Image:
    """Return an image with a line of text above it."""
    font = _font(font_size)
    height = math.ceil(font.getbbox(title)[3]) + 10
    width = max(sheet.width, math.ceil(font.getlength(title)) + 10)
    titled = Image.new("RGB", (width, sheet.height + height), PAPER)
    ImageDraw.Draw(titled).text((5, 4), title, INK, font)
    titled.paste(sheet, (0, height))
    return titled


@cache
def _font(size: int = 11) -> Font:
    return ImageFont.load_default(size=size)
