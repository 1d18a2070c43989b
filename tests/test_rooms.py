"""The rooms of the package import one way; see .github/guides/architecture.md."""

import re
import shutil
import subprocess
import sys

from tests.conftest import REPOSITORY


def lint(folder):
    return subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"],
        cwd=folder,
        capture_output=True,
        text=True,
    )


def test_rooms_import_only_the_rooms_below_them():
    done = lint(REPOSITORY)
    assert done.returncode == 0, done.stdout


def test_an_import_upwards_is_named(tmp_path):
    shutil.copytree(REPOSITORY / "bn_lightning", tmp_path / "bn_lightning")
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    for file, line in (
        ("norms/sync.py", "import bn_lightning.training.task"),
        ("runs/console.py", "from bn_lightning.tasks import classifier"),
    ):
        path = tmp_path / "bn_lightning" / file
        path.write_text(path.read_text().replace("\nfrom ", f"\n{line}\nfrom ", 1))
    done = lint(tmp_path)
    assert done.returncode == 1
    assert "bn_lightning.norms.sync -> bn_lightning.training.task" in done.stdout
    assert "bn_lightning.runs.console -> bn_lightning.tasks.classifier" in done.stdout


def test_the_guide_names_places_that_exist():
    guide = (REPOSITORY / ".github/guides/architecture.md").read_text(encoding="utf-8")
    places = re.findall(r"`([\w/]+(?:/|\.py))`", guide)
    assert len(places) > 30
    for place in places:
        homes = (REPOSITORY, REPOSITORY / "bn_lightning")
        assert any((home / place).exists() for home in homes), place
    for name in re.findall(r"`(\w+)` in `([\w/]+\.py)`", guide):
        assert name[0] in (REPOSITORY / "bn_lightning" / name[1]).read_text(encoding="utf-8"), name
