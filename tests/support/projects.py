"""Projects that `new` creates: their files, and git."""

import subprocess
from pathlib import Path

from tests.conftest import run_here

FILES = (
    "pyproject.toml",
    "README.md",
    ".gitignore",
    ".github/workflows/ci.yml",
    *(f"{{name}}/{module}.py" for module in ("__init__", "__main__", "experiment", "network")),
    *(f"{{name}}/{module}.py" for module in ("data", "norms")),
    "configs/baseline.yaml",
    "configs/debug.yaml",
    "tests/test_{name}.py",
)


IDENTITY = ("-c", "user.name=Owner", "-c", "user.email=owner@localhost")


def new(path, *flags, check=True):
    """Run `new PATH` in this process, in a folder that exists."""
    cwd = next(folder for folder in Path(path).parents if folder.is_dir())
    return run_here("new", path, *flags, cwd=cwd, check=check)


def git(folder, *arguments):
    """Run git in a folder and return what it prints."""
    done = subprocess.run(
        ["git", *IDENTITY, *arguments], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def edit(path, old, new):
    """Replace a text in a file."""
    text = path.read_text(encoding="utf-8")
    assert old in text, (path.name, old)
    path.write_text(text.replace(old, new), encoding="utf-8")


def merge(folder):
    """Merge the branch `template`, and return the files with conflicts."""
    subprocess.run(["git", *IDENTITY, "merge", "template"], cwd=folder, capture_output=True)
    return git(folder, "diff", "--name-only", "--diff-filter=U").splitlines()


def commit(folder, message="a change"):
    """Commit all files of a project."""
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", message)
