"""What is seen at a real terminal: a pseudo-terminal, where the system has one."""

import os
import re
import subprocess
import sys

import pytest
from PIL import Image

from bn_lightning import terminal
from bn_lightning.data import sources
from tests.conftest import QUICK, on_cpu

pty = pytest.importorskip("pty", reason="needs a pseudo-terminal")
termios = pytest.importorskip("termios", reason="needs a pseudo-terminal")


def at_a_terminal(*arguments, cwd, **environment):
    """Exit code and all that the command writes where its output is a terminal."""
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (40, 150))
    env = {n: v for n, v in os.environ.items() if n not in ("NO_COLOR", "COLUMNS")} | {"TERM": "xterm-256color"}
    process = subprocess.Popen(
        [sys.executable, "-m", "bn_lightning", *on_cpu(arguments)],
        stdin=its, stdout=its, stderr=its, cwd=cwd, env=env | environment,
    )  # fmt: skip
    os.close(its)
    seen = b""
    while True:
        try:
            part = os.read(ours, 65_536)
        except OSError:  # Linux's word for the end
            break
        if not part:
            break
        seen += part
    os.close(ours)
    return process.wait(), seen.decode()


def test_progress_with_loss_accuracy_and_speed(tmp_path):
    code, seen = at_a_terminal("fit", *QUICK, cwd=tmp_path)
    assert code == 0
    bars = re.findall(r"Epoch 1:.*?\d+/22 .*?loss=([\d.]+), acc=([\d.]+), images/s=([\d,]+), val_acc=([\d.]+)", seen)
    assert bars
    loss, acc, speed, val_acc = (float(value.replace(",", "")) for value in bars[-1])
    assert 0 < loss < 3 and 0.1 < acc <= 1 and 0.1 < val_acc <= 1 and speed > 100
    assert "v_num" not in seen
    assert len(re.findall(r"epoch  [12]/2  train loss", seen)) == 2
    assert "\x1b[1mclass" in seen  # bold
    assert "look at it with: tensorboard --logdir runs" in seen


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colours_where_they_are_not_wanted(trained, tmp_path, environment):
    folder, _ = trained
    code, seen = at_a_terminal("inspect", folder / "checkpoints/best.ckpt", cwd=tmp_path, **environment)
    assert code == 0
    colours = re.findall(r"\x1b\[[\d;]*m", seen)
    assert not any(re.search(r"\[(3|4|9|10)\d", colour) for colour in colours)
    assert not colours or environment != {"TERM": "dumb"}


def test_quiet_where_the_output_is_no_terminal(trained):
    _, printed = trained
    assert "\x1b" not in printed and "\r" not in printed
    assert len([line for line in printed.splitlines() if line.startswith("epoch ")]) == 2
    assert len(printed.splitlines()) < 30


def test_names_are_printed_as_they_are(capsys):
    names = ["shoe[draft].png", ":smile:.png", "a[/b]c.png", "x" * 300]
    terminal.print_table(("image", "class"), [[name, "Bag"] for name in names])
    _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split() for row in rows] == [[name, "Bag"] for name in names]


def test_a_long_name_leaves_room_for_the_answer(trained, tmp_path):
    name = "a-very-long-name-of-a-picture-" * 6 + ".png"
    Image.fromarray(sources.load("sample").test_images[0].numpy()).save(tmp_path / name)
    given = ("--ckpt_path", trained[0] / "checkpoints/best.ckpt", "--data.images", name)
    code, seen = at_a_terminal("predict", *given, cwd=tmp_path)
    assert code == 0
    seen = re.sub(r"\x1b\[[\d;]*m", "", seen)
    assert re.search(r" no +(\S+( boot)?) +0\.\d{3} ", seen), seen
