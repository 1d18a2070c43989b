"""The wheel works without the checkout from which it was built.

A project is started from it, and the commands of the guide "Start your own project" run as printed.
"""

import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.support.projects import FILES, commit
from tests.test_readme import blocks, example

GUIDE = REPOSITORY / ".github/guides/own-project.md"
# Without PYTHONPATH, modules of the checkout or the user cannot be imported.
CLEAN = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
# The runs of these commands are shortened.
SHORT = "--trainer.max_epochs 1 --trainer.limit_train_batches 2"
SHORTENED = ("python -m shoe_shop compare", "python -m shoe_shop fit --config")


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
    start, use, settings, tests, upgrade = blocks("sh", [GUIDE])
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
    assert "5 passed" in bash(test, cwd=project)

    # This package, from the same environment
    empty = tmp_path / "empty"
    empty.mkdir()
    brief = ("--data.source", "sample", "--trainer.max_epochs", 1, "--trainer.accelerator")
    run(python, "-m", "bn_lightning", "fit", *brief, "cpu", cwd=empty)
    assert (empty / "runs/lenet/0/result.json").is_file()
    script = python.with_name("bn_lightning")
    done = run(script, "check", "custom", "--identical", cwd=empty)
    assert "custom: " in done.stdout and "FAIL" not in done.stdout
    # Messages have the name of the console script.
    done = run(script, "fit", "--lr", 1, cwd=empty, check=False)
    assert done.returncode == 2 and "All settings: bn_lightning fit --help" in done.stderr

    # The guide: two files are changed.
    for old, new in changes():
        file = project / "shoe_shop/experiment.py"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))
    (project / "shoe_shop/network.py").write_text(example("class Block"))
    draw_pictures(project)
    commit(project, "a residual network on our pictures")
    activate = ". .venv/bin/activate\n"
    (project / "runs/shoe_shop").rename(project / "runs/of_the_sample")
    printed = bash(activate + use, cwd=project)
    assert float(re.findall(r"test acc ([\d.]+)", printed)[0]) > 0.9
    assert (project / "model.pt2").is_file()
    lines = [f"{x} {SHORT}" if x.startswith(SHORTENED) else x for x in settings.splitlines()]
    assert "6 runs, 0 failed" in bash(activate + "\n".join(lines), cwd=project)
    assert "5 passed" in bash(activate + tests, cwd=project)
    # The same version has nothing to merge.
    printed = bash(activate + upgrade, cwd=project)
    assert "nothing to merge" in printed and "Already up to date" in printed


def bash(script, cwd):
    return run("bash", "-e", "-c", script, cwd=cwd).stdout


def changes():
    """Yield the lines before and after each change of the guide."""
    for block in blocks("diff", [GUIDE]):
        lines = block.splitlines(keepends=True)
        yield tuple("".join(x[1:] for x in lines if x[0] == sign) for sign in "-+")


def draw_pictures(folder):
    before = Path.cwd()
    os.chdir(folder)
    try:
        exec(compile(example("mgrid"), "own-pictures.md", "exec"), {})
    finally:
        os.chdir(before)
