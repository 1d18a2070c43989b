"""The life of a project: it is created and changed, the library and the template change, it is
upgraded.

The library of this test is a copy, which is changed as a new version would be.
"""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from tests.conftest import REPOSITORY
from tests.support.projects import commit, edit, merge

RUN = "runs/debug/0"
OWN_TEST = """\
from shoe_shop.data import load


def test_a_third_of_the_images_is_used():
    images, labels, *_ = load()
    assert len(images) == len(labels) == 2_000
"""


@pytest.fixture
def library(tmp_path):
    """The folder of a copy of the package."""
    junk = shutil.ignore_patterns("__pycache__", ".*_cache")
    shutil.copytree(REPOSITORY / "bn_lightning", tmp_path / "library/bn_lightning", ignore=junk)
    return tmp_path / "library/bn_lightning"


@pytest.fixture
def python(tmp_path, library):
    """Return a function that runs `python -m` with the copy and the project installed."""

    def run(*arguments, cwd=tmp_path / "shoe_shop"):
        paths = os.pathsep.join((str(tmp_path / "shoe_shop"), str(library.parent)))
        done = subprocess.run(
            [sys.executable, "-m", *map(str, arguments)],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": paths},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_project_is_changed_and_upgraded(tmp_path, library, python):
    project = tmp_path / "shoe_shop"
    python("bn_lightning", "new", project, "--requirement", "bn_lightning", cwd=tmp_path)

    change_as_owner(project)
    before = int(re.search(r"(\d+)/\d+ tests collected", run_tests(python, "--co"))[1])
    python("shoe_shop", "fit", "--config", "configs/debug.yaml", "--trainer.accelerator", "cpu")
    expected = last_weights(project)
    shutil.move(project / RUN, tmp_path / "before")
    commit(project, "our own network, data and settings")

    change_library(library)
    change_template(library / "template")
    printed = python("bn_lightning", "new", ".", "--update")
    # The version is in a fourth file, pyproject.toml.
    assert "git merge template" in printed and "4 files changed" in printed
    # Git asks only where both have changed the same place.
    assert merge(project) == ["shoe_shop/experiment.py"]
    text = (project / "shoe_shop/experiment.py").read_text()
    [conflict] = re.findall(r"<<<<<<< .*?>>>>>>> \w+\n", text, flags=re.S)
    assert '"data.shift": 1' in conflict and '"data.batch_size": 48' in conflict
    resolved = '        "data.batch_size": 48,\n        "data.shift": 1,\n'
    (project / "shoe_shop/experiment.py").write_text(text.replace(conflict, resolved))
    commit(project, "upgrade")

    # Nothing of either side is lost.
    assert '"bn_lightning>=0.3.0,<0.4"' in (project / "pyproject.toml").read_text()
    readme = (project / "README.md").read_text()
    assert "## Our shoes" in readme and "## All commands" in readme
    printed = run_tests(python)
    passed, skipped = map(int, re.search(r"(\d+) passed, (\d+) skipped", printed).groups())
    # One for each property of the norm, the task and the data, and those of the project.
    assert passed > 40 and passed + skipped == before
    # The settings of a run do not depend on defaults, which have changed.
    settings = tmp_path / "before/config.yaml"
    python("shoe_shop", "fit", "--config", settings)
    found = last_weights(project)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert "label_smoothing: 0.0" in (project / RUN / "config.yaml").read_text()


def run_tests(python, *flags):
    """Run the tests of the project, without those that compile, export or start runs."""
    slow = ("compiled", "onnx", "exported", "killed", "reproduce", "processes", "its_results")
    chosen = " and ".join(f"not {word}" for word in slow)
    return python("pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *flags)


def last_weights(project):
    file = project / RUN / "checkpoints/last.ckpt"
    return torch.load(file, weights_only=True)["state_dict"]


def change_as_owner(project):
    """Change network, data, a config and the README, and add a test."""
    edit(project / "shoe_shop/network.py", "nn.ReLU()", "nn.SiLU()")
    edit(project / "shoe_shop/network.py", "nn.MaxPool2d(2)", "nn.AvgPool2d(2)")
    edit(
        project / "shoe_shop/data.py",
        "images.train_images, images.train_labels",
        "images.train_images[::3], images.train_labels[::3]",
    )
    edit(project / "configs/debug.yaml", "max_epochs: 1", "max_epochs: 2")
    edit(project / "shoe_shop/experiment.py", '"data.batch_size": 64', '"data.batch_size": 48')
    with (project / "README.md").open("a") as readme:
        readme.write("\n## Our shoes\n\nThey are brown.\n")
    (project / "tests/test_ours.py").write_text(OWN_TEST)


def change_library(library):
    """Rename a private function, change a default, and raise the version."""
    renamed = 0
    for file in library.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        changed = text.replace("_read_labels", "_labels_of_samples")
        renamed += changed != text
        file.write_text(changed, encoding="utf-8")
    assert renamed
    edit(
        library / "tasks/classifier.py",
        "label_smoothing: float = 0.0",
        "label_smoothing: float = 0.1",
    )
    edit(library / "__init__.py", '__version__ = "0.2', '__version__ = "0.3')


def change_template(template):
    """Change three places, one of them next to a change of the owner."""
    edit(template / "README.md", "## Commands", "## All commands")
    edit(template / ".github/workflows/ci.yml", "timeout-minutes: 30", "timeout-minutes: 20")
    edit(
        template / "my_project/experiment.py",
        '"data.batch_size": 64,\n',
        '"data.batch_size": 64,\n        "data.shift": 1,\n',
    )
