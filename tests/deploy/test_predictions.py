"""Predictions as a table, CSV, JSON and an image sheet."""

import csv
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from bn_lightning.deploy.predictions import Predictions, refuse_invalid_sheet_path
from bn_lightning.errors import RunFailed, UserError
from bn_lightning.monitoring import drawing

NAMES = ("coat", "dress", "bag")
ABOUT = ({"image": "a.png", "inverted": True}, {"image": "b,[c].png", "inverted": False})
PROBABILITIES = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.05, 0.45]])
PREDICTIONS = Predictions(ABOUT, PROBABILITIES, NAMES)
FIRST = {"class": "dress", "probability": 0.7, "runner_up": "bag", "runner_up_probability": 0.2}
SECOND = {"class": "coat", "probability": 0.5, "runner_up": "bag", "runner_up_probability": 0.45}
ROWS = [{**ABOUT[0], **FIRST}, {**ABOUT[1], **SECOND}]


def test_json_contains_all_values(capsys):
    PREDICTIONS.print("json")
    printed = capsys.readouterr()
    assert json.loads(printed.out) == ROWS and printed.err == ""


@pytest.mark.parametrize("form", ["csv", "json"])
def test_a_person_is_told_that_probabilities_are_uncalibrated(capsys, monkeypatch, form):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    PREDICTIONS.print(form)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Probabilities are uncalibrated: ")


def test_csv_contains_all_values(capsys):
    PREDICTIONS.print("csv")
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row.pop("inverted") for row in rows] == ["yes", "no"]
    assert rows == [
        {name: str(value) for name, value in row.items() if name != "inverted"} for row in ROWS
    ]


def test_names_are_escaped_on_a_terminal_only(capsys, monkeypatch):
    name = "b\x1b[31mä"
    named = Predictions(ABOUT, PROBABILITIES, ("coat", name, "bag"))
    named.print("csv")
    assert name in capsys.readouterr().out
    for form in ("table", "json"):
        named.print(form)
        assert "\x1b" not in capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    named.print("csv")
    assert capsys.readouterr().out.splitlines()[1] == r"a.png,yes,b\x1b[31mä,0.7,bag,0.2"


def test_the_table_has_short_titles(capsys):
    PREDICTIONS.print("table")
    header, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    p = ["uncalibrated", "p"]
    assert header == ["image", "inverted", "class", *p, "runner-up", *p]
    assert rows[0] == ["a.png", "yes", "dress", "0.700", "bag", "0.200"]
    assert rows[1] == ["b,[c].png", "no", "coat", "0.500", "bag", "0.450"]


def test_the_sheet_shows_the_first_400_images(tmp_path, capsys, monkeypatch):
    titles, titled = [], drawing.titled
    monkeypatch.setattr(
        drawing, "titled", lambda sheet, title: titles.append(title) or titled(sheet, title)
    )
    PREDICTIONS.draw(tmp_path / "grid.png", torch.full((2, 5, 5), 200, dtype=torch.uint8))
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.width > 2 * 84
    assert titles == ["Probabilities are uncalibrated"]
    assert capsys.readouterr().err == ""
    many = Predictions(ABOUT * 201, PROBABILITIES.repeat(201, 1), NAMES)
    many.draw(tmp_path / "grid.png", torch.zeros(400, 5, 5, dtype=torch.uint8))
    assert capsys.readouterr().err == f"{tmp_path / 'grid.png'} shows the first 400 of 402 images\n"
    message = "Cannot write the image sheet '.*folder.png': Is a directory"
    with pytest.raises(RunFailed, match=message):
        (tmp_path / "folder.png").mkdir()
        PREDICTIONS.draw(tmp_path / "folder.png", torch.zeros(2, 5, 5, dtype=torch.uint8))


def test_unusable_paths_of_a_sheet_are_refused(tmp_path):
    refuse_invalid_sheet_path(tmp_path / "grid.png")
    with pytest.raises(UserError, match=r"There is no folder 'nowhere' for --grid nowhere/a.png"):
        refuse_invalid_sheet_path(Path("nowhere/a.png"))
    with pytest.raises(UserError, match=r"Unsupported image format '.nix' .* --grid .*grid.png"):
        refuse_invalid_sheet_path(tmp_path / "grid.nix")
