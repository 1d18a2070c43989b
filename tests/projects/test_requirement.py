"""How a project installs this package."""

import json
import re
import shlex
import tomllib

import pytest
from packaging.requirements import Requirement

import bn_lightning
from bn_lightning import UserError
from bn_lightning.projects import requirement
from tests.conftest import REPOSITORY
from tests.support.projects import new

PYPROJECT = '[project]\nname = "bn-lightning"\n'
GIT = "git+https://example.com/team/bn_lightning.git"


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        (
            {"url": "https://example.com/bn_lightning-1.whl", "archive_info": {}},
            "bn_lightning @ https://example.com/bn_lightning-1.whl",
        ),
        (
            {"url": GIT[4:], "vcs_info": {"vcs": "git", "commit_id": "9f"}},
            f"bn_lightning @ {GIT}",
        ),
        (
            {
                "url": GIT[4:],
                "vcs_info": {"vcs": "git", "commit_id": "9f", "requested_revision": "v1"},
                "subdirectory": "python",
            },
            f"bn_lightning @ {GIT}@v1#subdirectory=python",
        ),
        (
            {"url": "file:///home/a%20b/bn", "dir_info": {"editable": True}},
            "-e ../bn",
        ),
        ({"url": "file:///home/a%20b/bn", "dir_info": {}}, "../bn"),
        ({"url": "file:///opt/bn-1.whl", "archive_info": {}}, "/opt/bn-1.whl"),
        (None, "bn_lightning"),
    ],
)
def test_the_default_is_how_the_package_is_installed(tmp_path, monkeypatch, origin, expected):
    # A clone may contain other metadata, without direct_url.json.
    for name, files in (
        ("first/bn_lightning.egg-info", {"PKG-INFO": "Name: bn_lightning"}),
        (
            "second/bn_lightning-1.dist-info",
            {"METADATA": "Name: bn_lightning"}
            | ({} if origin is None else {"direct_url.json": json.dumps(origin)}),
        ),
    ):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for file, text in files.items():
            (folder / file).write_text(text)
    paths = [str(tmp_path / "first"), str(tmp_path / "second")]
    monkeypatch.setattr("sys.path", paths)
    monkeypatch.setattr(requirement, "__file__", str(tmp_path / "site/bn_lightning/projects/x.py"))
    project = requirement.Path("/home/a b/shop")
    assert requirement.installed(project) == expected
    # pip reads it as it is meant.
    dependency = Requirement(requirement.dependency(expected))
    assert dependency.url == (expected.partition(" @ ")[2] or None)
    if dependency.url is None:
        assert bn_lightning.__version__ in dependency.specifier


def test_a_clone_that_is_not_installed_is_used_from_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [])
    assert requirement.installed(tmp_path / "shop") == f"-e {REPOSITORY.as_posix()}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bn_lightning", "bn_lightning"),
        (" bn-lightning==0.7.1 ", "bn_lightning==0.7.1"),
        (GIT, f"bn_lightning @ {GIT}"),
        (f"bn_lightning @ {GIT}", f"bn_lightning @ {GIT}"),
        ("clone", "../clone"),
        ("-e clone", "-e ../clone"),
        ("wheels/bn_lightning-1.whl", "../wheels/bn_lightning-1.whl"),
    ],
)
def test_requirements_of_the_user(tmp_path, monkeypatch, text, expected):
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone/pyproject.toml").write_text(PYPROJECT)
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels/bn_lightning-1.whl").write_text("")
    monkeypatch.chdir(tmp_path)
    assert requirement.given(text, tmp_path / "shop") == expected
    if "clone" in text:
        url = (tmp_path / "clone").as_uri()
        assert requirement.given(url, tmp_path / "shop") == "../clone"
        assert requirement.given(f"bn_lightning @ {url}", tmp_path / "shop") == "../clone"


@pytest.mark.parametrize(
    "text", ["torch>=2", "no/path", "bn_lightning>>2", "empty", "other", "a.py", ""]
)
def test_other_requirements_are_refused(tmp_path, monkeypatch, text):
    for name, table in (("empty", ""), ("other", PYPROJECT.replace("bn-lightning", "shop"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pyproject.toml").write_text(table)
    (tmp_path / "a.py").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="neither a path nor a requirement of bn_lightning"):
        requirement.given(text, tmp_path / "shop")


@pytest.mark.parametrize(
    ("version", "expected"),
    [("0.2.0", ">=0.2.0,<0.3"), ("0.10.1", ">=0.10.1,<0.11"), ("3.1.4", ">=3.1.4,<4")],
)
def test_versions_end_before_the_next_breaking_one(monkeypatch, version, expected):
    monkeypatch.setattr(requirement, "__version__", version)
    assert requirement.dependency("bn_lightning") == f"bn_lightning{expected}"
    assert requirement.dependency("-e ../bn") == f"bn_lightning{expected}"


@pytest.mark.parametrize("prefix", ["", "-e "])
def test_a_path_is_installed_by_the_first_command_of_the_readme(tmp_path, prefix):
    clone = tmp_path / "a clone"
    clone.mkdir()
    (clone / "pyproject.toml").write_text(PYPROJECT)
    done = new(tmp_path / "shop", f"--requirement={prefix}{clone}")
    assert "CI cannot install bn_lightning" in done.stdout
    readme = (tmp_path / "shop/README.md").read_text()
    first, second = re.findall(r"^python3 -m venv.*|^\.venv/bin/pip.*", readme, flags=re.M)
    assert f" install {prefix}'../a clone' -e . && " in first
    assert "clone" not in second
    assert f"pip install --upgrade {prefix}'../a clone'\n" in readme
    words = shlex.split(first)
    assert (tmp_path / "shop" / words[words.index("install") + len(prefix.split()) + 1]).is_dir()
    table = tomllib.loads((tmp_path / "shop/pyproject.toml").read_text())
    assert table["project"]["dependencies"][0].startswith("bn_lightning>=")


def test_an_address_is_a_dependency(tmp_path):
    done = new(tmp_path / "shop", "--requirement", GIT)
    assert "CI cannot" not in done.stdout
    table = tomllib.loads((tmp_path / "shop/pyproject.toml").read_text())
    assert table["project"]["dependencies"] == [f"bn_lightning @ {GIT}"]
    readme = (tmp_path / "shop/README.md").read_text()
    assert "/pip install -e . && " in readme
    assert f"pip install --upgrade 'bn_lightning @ {GIT}'\n" in readme
