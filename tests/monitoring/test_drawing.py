"""Figures drawn with Pillow."""

import numpy as np
import torch

from bn_lightning.monitoring import drawing


def test_the_grid_shows_each_image_once():
    images = torch.arange(7, dtype=torch.uint8).view(7, 1, 1).expand(7, 28, 28) * 30 + 20
    sheet = np.asarray(drawing.grid(images, [f"{n}" for n in range(7)], columns=3))
    width, height = sheet.shape[1] // 3, sheet.shape[0] // 3
    shown = [
        int(sheet[row * height + 40, column * width + width // 2, 0])
        for row in range(3)
        for column in range(3)
    ]
    assert shown == [20, 50, 80, 110, 140, 170, 200, 255, 255]


def test_cells_grow_with_their_captions():
    images = torch.zeros(2, 28, 28, dtype=torch.uint8)
    narrow, wide = (drawing.grid(images, [text] * 2) for text in ("a", "a" * 60))
    assert wide.width > 3 * narrow.width
    two_lines = drawing.grid(images, ["a\nb"] * 2)
    assert two_lines.height == narrow.height + drawing.LINE


def test_positive_weights_are_red_and_negative_weights_are_blue():
    weight = torch.tensor([1.0, -1.0, 0.0]).view(3, 1, 1, 1).expand(3, 1, 5, 5)
    sheet = np.asarray(drawing.filters(weight)).astype(int)
    width = sheet.shape[1] // 3
    red, blue, white = (sheet[40, n * width + width // 2] for n in range(3))
    assert red[0] > 180 and red[2] < 60
    assert blue[2] > 180 and blue[0] < 60
    assert (white == 255).all()


def test_the_shade_of_a_cell_shows_its_fraction_of_the_row():
    counts = torch.tensor([[90, 10, 0], [0, 5, 5], [0, 0, 0]])
    sheet = np.asarray(drawing.confusion(counts, ["one", "two", "three"])).astype(int)
    # The first cell has the first pixel with a colour.
    is_coloured = sheet[..., 0] < sheet[..., 2]
    rows, columns = np.flatnonzero(is_coloured.any(1)), np.flatnonzero(is_coloured.any(0))
    assert rows[0] == columns[0]
    cell = (sheet.shape[0] - rows[0]) // 3

    def shade(row, column):
        return sheet[rows[0] + row * cell + 3, columns[0] + column * cell + 3].sum()

    assert (
        shade(0, 0)
        < shade(1, 1)
        == shade(1, 2)
        < shade(0, 1)
        < shade(0, 2)
        == 3 * 255
        == shade(2, 2)
    )


def test_the_width_of_a_confusion_matrix_is_a_multiple_of_that_of_a_card():
    for num_classes in (2, 10, 30):
        counts = torch.full((num_classes, num_classes), 1_000)
        sheet = drawing.confusion(counts, [f"class {n}" for n in range(num_classes)])
        assert sheet.width == sheet.height and sheet.width % drawing.CARD_WIDTH == 0
