"""The wheel works without the checkout from which it was built: a project is started from it."""

import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.support.projects import FILES
from tests.test_readme import blocks

GUIDE = REPOSITORY / ".github/guides/own-project.md"
# Without PYTHONPATH, modules of the checkout or the user cannot be imported.
CLEAN = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(*command, cwd, check=True):
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=CLEAN, capture_output=True, text=True
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The file of a wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    # A clone has only committed files. The checkout may contain old build folders.
    run("git", "clone", "--quiet", REPOSITORY, folder / "clone", cwd=folder)
    pip = [sys.executable, "-m", "pip"]
    build = ["wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder]
    run(*pip, *build, folder / "clone", cwd=folder)
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_the_wheel_contains_all_sub_packages_the_sample_and_the_template(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    packages = {Path(name).parts[1] for name in names if name.startswith("bn_lightning/")}
    expected = {
        path.name for path in (REPOSITORY / "bn_lightning").glob("*/") if path.name[0] != "_"
    }
    assert expected <= packages
    assert "bn_lightning/data/sample/train-images-idx3-ubyte.gz" in names
    assert "bn_lightning/py.typed" in names
    assert not any(name.startswith("tests") for name in names)
    prefix = "bn_lightning/template/"
    template = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    assert template == {name.format(name="my_project") for name in FILES}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_project_is_started_from_the_wheel(wheel, tmp_path):
    # `new` needs one small package.
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin/python"
    install = (python, "-m", "pip", "install", "--quiet")
    installed = run(*install, "packaging", cwd=tmp_path, check=False)
    if re.search("connection|Temporary failure|No matching distribution", installed.stderr):
        pytest.skip(f"no package registry is reachable: {installed.stderr.splitlines()[-1]}")
    run(*install, "--no-deps", wheel, cwd=tmp_path)
    start, *_, upgrade = blocks("sh", [GUIDE])
    here = tmp_path / "here"
    here.mkdir()
    bash(f"PATH={environment}/bin:$PATH\n{start}", cwd=here)
    project = tmp_path / "shoe_shop"
    python = project / ".venv/bin/python"

    # The two commands of its README
    readme = (project / "README.md").read_text()
    train, test = re.findall(r"^python3 -m venv.*|^\.venv/bin/pip.*", readme, flags=re.M)
    assert f"pip install {wheel} -e . " in train
    assert "Ankle boot" in bash(train, cwd=project)
    assert re.search(r"= \d+ passed, \d+ skipped in", bash(test, cwd=project))

    # This package, from the same environment: messages have the name of the console script.
    done = run(python.with_name("bn_lightning"), "fit", "--lr", 1, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "All settings: bn_lightning fit --help" in done.stderr
    # The same version has nothing to merge.
    printed = bash(f". .venv/bin/activate\n{upgrade}", cwd=project)
    assert "nothing to merge" in printed and "Already up to date" in printed


def bash(script, cwd):
    return run("bash", "-e", "-c", script, cwd=cwd).stdout
