"""Figures drawn with Pillow."""

import numpy as np
import pytest
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


def pixel(sheet, columns, rows, number):
    """Return the color near the center of a cell."""
    pixels = np.asarray(sheet).astype(int)
    height, width = pixels.shape[0] // rows, pixels.shape[1] // columns
    return pixels[number // columns * height + 35, number % columns * width + width // 2].tolist()


def test_small_images_are_enlarged_evenly_and_large_ones_reduced():
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (1, 20, 24, 3), dtype=np.uint8)
    sheet = np.asarray(drawing.grid(torch.tensor(image), [""]))
    enlarged = image[0].repeat(3, 0).repeat(3, 1)
    assert (sheet[4:64, 5:77] == enlarged).all()
    checkers = torch.tensor([[0, 200], [200, 0]], dtype=torch.uint8).tile(84, 84)
    sheet = np.asarray(drawing.grid(checkers.unsqueeze(0), [""]))
    assert (sheet[4:88, 5:89] == 100).all()


def test_filters_of_one_channel_are_gray():
    weight = torch.tensor([1.0, -1.0, 0.0, 0.5]).view(4, 1, 1, 1).expand(4, 1, 5, 5)
    sheet = drawing.filters(weight)
    assert [pixel(sheet, 4, 1, n) for n in range(4)] == [[255] * 3, [0] * 3, [128] * 3, [191] * 3]


def test_filters_of_three_channels_are_in_color():
    weight = torch.tensor([[2.0, 0.0, -2.0], [-1.0, 1.0, 0.0]])
    sheet = drawing.filters(weight.view(2, 3, 1, 1).expand(2, 3, 7, 7))
    assert [pixel(sheet, 2, 1, n) for n in range(2)] == [[255, 128, 0], [64, 191, 128]]


def test_filters_of_other_channels_are_gray_with_a_column_per_channel():
    weight = torch.tensor([[1.0, -1.0], [0.0, 1.0], [-1.0, 0.0]])
    sheet = drawing.filters(weight.view(3, 2, 1, 1).expand(3, 2, 3, 3))
    shown = [pixel(sheet, 2, 3, n)[0] for n in range(6)]
    assert shown == [255, 0, 128, 255, 0, 128]


@pytest.mark.parametrize(("channels", "filters"), [(1, 65), (3, 100), (5, 40)])
def test_the_number_of_filters_is_limited(monkeypatch, channels, filters):
    drawn = []
    monkeypatch.setattr(drawing, "titled", lambda sheet, title, *size: drawn.append(title))
    drawing.filters(torch.randn(filters, channels, 3, 3))
    kind = "pairs of filter and channel" if channels == 5 else "filters"
    total = filters * (channels if channels == 5 else 1)
    assert drawn == [f"The first 64 of {total} {kind}"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("T-shirt/top", "T-shirt/top"),
        ("café à la crème", "cafe a la creme"),
        ("Straße", "Stra?e"),
        ("猫", "class 7"),
        ("犬 2", "class 7"),
        ("why?", "why?"),
        ("a very long name that does not fit", "a very lon...es not fit"),
    ],
)
def test_names_of_classes_are_legible(name, shown):
    assert drawing.legible(name, 7) == shown


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
    for num_classes in (2, 10, 20):
        counts = torch.full((num_classes, num_classes), 1_000)
        sheet = drawing.confusion(counts, [f"class {n}" for n in range(num_classes)])
        assert sheet.width == sheet.height and sheet.width % drawing.CARD_WIDTH == 0


def test_a_confusion_matrix_of_many_classes_has_the_worst_and_a_column_for_the_others():
    # Class c has the accuracy (c + 1) / 25. Its mistakes are counted as class 24, which is the
    # best one, so it is not shown.
    right = torch.arange(1, 26)
    counts = torch.diag(right)
    counts[:, 24] += 25 - right
    sheet = np.asarray(drawing.confusion(counts, [f"{c}" for c in range(25)])).astype(int)
    is_coloured = sheet[..., 0] < sheet[..., 2]
    rows, columns = np.flatnonzero(is_coloured.any(1)), np.flatnonzero(is_coloured.any(0))
    top, left = rows[0], columns[0]
    cell = (sheet.shape[1] - left) // 21

    def red(row, column):
        return int(sheet[top + row * cell + 3, left + column * cell + 3, 0])

    for row in range(20):
        shades = [red(row, column) for column in range(21)]
        expected = [255] * 21
        expected[row] = int(255 - 225 * ((row + 1) / 25) ** 0.5)
        expected[20] = int(255 - 225 * ((24 - row) / 25) ** 0.5)
        assert shades == pytest.approx(expected, abs=1)
    assert sheet.shape[1] % drawing.CARD_WIDTH == 0
    # The title is in black on white.
    assert (sheet[:20].min(), sheet[:20].max()) == (30, 255)
