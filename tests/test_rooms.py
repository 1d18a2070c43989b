"""Import rules between the packages; see .github/guides/architecture.md."""

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


def test_packages_import_only_packages_below_them():
    done = lint(REPOSITORY)
    assert done.returncode == 0, done.stdout


def test_an_upward_import_is_reported(tmp_path):
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


def test_the_architecture_guide_names_existing_files():
    guide = (REPOSITORY / ".github/guides/architecture.md").read_text(encoding="utf-8")
    paths = re.findall(r"`([\w/]+(?:/|\.py))`", guide)
    assert len(paths) > 30
    for path in paths:
        roots = (REPOSITORY, REPOSITORY / "bn_lightning")
        assert any((root / path).exists() for root in roots), path
    for name in re.findall(r"`(\w+)` in `([\w/]+\.py)`", guide):
        assert name[0] in (REPOSITORY / "bn_lightning" / name[1]).read_text(encoding="utf-8"), name
