"""Output for terminals: the program's name, printable text, and tables."""

import re
import subprocess
import sys

import pytest
from PIL import Image

from bn_lightning import terminal
from bn_lightning.data import sources
from tests.support.pseudo_terminal import at_a_terminal

# The name of the program


def printed_by(*command, cwd):
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=True, cwd=cwd
    ).stdout.strip()


def test_the_program_has_the_name_with_which_it_was_started(tmp_path):
    (tmp_path / "toy").mkdir()
    for file in ("toy/__init__.py", "toy/__main__.py", "toy/other.py", "script.py"):
        (tmp_path / file).write_text("from bn_lightning import terminal\nprint(terminal.program())")
    (tmp_path / "toy/__init__.py").write_text("")
    assert printed_by("-m", "toy", cwd=tmp_path) == "python -m toy"
    assert printed_by("-m", "toy.other", cwd=tmp_path) == "python -m toy.other"
    assert printed_by("script.py", cwd=tmp_path) == "script.py"
    assert printed_by(tmp_path / "script.py", cwd=tmp_path) == "script.py"


def test_the_name_of_the_program_can_be_set(monkeypatch):
    monkeypatch.setattr(terminal, "_program", None)
    own = terminal.program()
    terminal.set_program("shoes")
    assert terminal.program() == "shoes"
    terminal.set_program(None)
    assert terminal.program() == own


# Printable text


@pytest.mark.parametrize(
    "text",
    [
        "Größe",
        "u\u0308",
        "猫の絵",
        "קטגוריה",
        "می\u200cشد",
        "👩\u200d🔬",
        r"C:\new\x1b",
        "a  b",
        "",
    ],
)
def test_words_of_all_languages_are_printable(text):
    assert terminal.printable(text) == text


def test_control_characters_are_escaped():
    # All control characters, and those that reorder text (Unicode 16, standard annex 9).
    controls = [*range(32), *range(127, 160), 0x61C, 0x200E, 0x200F]
    controls += [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]
    text = "".join(map(chr, controls))
    shown = terminal.printable(f"a{text}b")
    assert shown.startswith(r"a\x00\x01") and shown.endswith(r"\u2068\u2069b")
    assert not set(shown) & set(text)
    assert shown.encode().decode("unicode_escape") == f"a{text}b"
    assert terminal.printable_lines("a\x1b\n\r\nb\n") == "a\\x1b\n\\r\nb\n"
    assert terminal.table(("a\n", "b"), [["c\t", "d\x9b"]]).split() == [
        r"a\n",
        "b",
        r"c\t",
        r"d\x9b",
    ]


# Tables


def test_names_are_printed_unchanged(capsys):
    names = ["shoe[draft].png", ":smile:.png", "a[/b]c.png", "x" * 300]
    terminal.print_table(("image", "class"), [[name, "Bag"] for name in names])
    _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split() for row in rows] == [[name, "Bag"] for name in names]


def test_numbers_in_a_table_are_right_aligned(capsys):
    rows = [["custom", 0.5, "a"], ["x", -12, "bc"], ["", "", "d"]]
    text = terminal.table(("norm", "value", "note"), rows)
    assert text.splitlines() == [
        "norm    value  note",
        "custom    0.5  a",
        "x         -12  bc",
        "               d",
    ]
    assert capsys.readouterr().out == ""
    terminal.print_table(("norm", "value", "note"), rows)
    assert capsys.readouterr().out == f"{text}\n"


def test_a_table_without_rows_is_its_header():
    assert terminal.table(("norm", "value"), []) == "norm  value"


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_colours_can_be_disabled(trained, tmp_path, environment):
    best = trained[0] / "checkpoints/best.ckpt"
    code, seen = at_a_terminal("inspect", best, cwd=tmp_path, **environment)
    assert code == 0
    colours = re.findall(r"\x1b\[[\d;]*m", seen)
    assert not any(re.search(r"\[(3|4|9|10)\d", colour) for colour in colours)
    assert not colours or environment != {"TERM": "dumb"}


def test_output_to_a_file_has_no_progress_bar_or_colours(trained):
    _, printed = trained
    assert "\x1b" not in printed and "\r" not in printed
    assert len([line for line in printed.splitlines() if line.startswith("epoch ")]) == 2
    assert len(printed.splitlines()) < 30


def test_a_long_name_leaves_room_for_the_prediction(trained, tmp_path):
    name = "a-very-long-name-of-an-image-" * 6 + ".png"
    Image.fromarray(sources.load("sample").test_images[0].numpy()).save(tmp_path / name)
    given = ("--ckpt_path", trained[0] / "checkpoints/best.ckpt", "--data.images", name)
    code, seen = at_a_terminal("predict", *given, cwd=tmp_path)
    assert code == 0
    seen = re.sub(r"\x1b\[[\d;]*m", "", seen)
    assert re.search(r" no +(\S+( boot)?) +0\.\d{3} ", seen), seen
