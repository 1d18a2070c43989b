"""The project of the guide "Start your own project": a residual network on a folder of pictures.

Its changes and its commands are those that the guide prints. tests/test_wheel.py installs a
project.
"""

import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, run_here
from tests.support.projects import git, new
from tests.test_readme import blocks, example

GUIDE = REPOSITORY / ".github/guides/own-project.md"
PROGRAM = "python -m shoe_shop "
# The runs of these commands are shortened.
SHORT = ("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2")


def changes():
    """Yield the lines before and after each change of the guide."""
    for block in blocks("diff", [GUIDE]):
        lines = block.splitlines(keepends=True)
        yield tuple("".join(x[1:] for x in lines if x[0] == sign) for sign in "-+")


@pytest.mark.slow
def test_two_files_are_changed_and_all_commands_run(tmp_path, monkeypatch):
    folder = tmp_path / "shoe_shop"
    new(folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    experiment = folder / "shoe_shop/experiment.py"
    for before, after in changes():
        text = experiment.read_text()
        assert before in text
        experiment.write_text(text.replace(before, after))
    (folder / "shoe_shop/network.py").write_text(example("class Block"))
    # Fewer pictures than in the guide are enough.
    exec(compile(example("mgrid").replace("900", "300"), "own-pictures.md", "exec"), {})
    changed = git(folder, "status", "--porcelain").split()[1::2]
    assert changed == ["shoe_shop/experiment.py", "shoe_shop/network.py"]

    output = {}
    lines = "\n".join(blocks("sh", [GUIDE])).splitlines()
    for arguments in (shlex.split(x.removeprefix(PROGRAM)) for x in lines if x.startswith(PROGRAM)):
        is_first = arguments == ["fit", "--name", "resnet"]
        shortened = SHORT if arguments[0] in ("fit", "compare") and not is_first else ()
        done = run_here(*arguments, *shortened, cwd=folder, module="shoe_shop")
        output[arguments[0], is_first] = done.stdout
        assert "bn_lightning" not in done.stdout + done.stderr
    assert "275 training and 25 test images" in output["fit", True]
    assert float(re.search(r"test_acc +(\S+)", output["test", False])[1]) > 0.6
    assert "dots" in output["predict", False]
    assert Path("model.pt2").is_file()
    assert "6 runs, 0 failed" in output["compare", False]
    assert "shoe_shop.norms.RMSNorm: " in output["check", False]
