"""The command `new`: the files of a project, its repository, and names that are refused."""

import ast
import os
import re
import subprocess
import tomllib

import pytest

from bn_lightning.projects import names
from tests.conftest import run_here
from tests.support.projects import FILES, git, new


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project and what `new` has printed. No test may change it."""
    folder = tmp_path_factory.mktemp("new")
    done = new(folder / "shoe_shop", "--title", "Shoe shop: boots & more", "--author", "Ana Núñez")
    return folder / "shoe_shop", done.stdout


def contents(folder):
    return {name: (folder / name).read_text() for name in git(folder, "ls-files").splitlines()}


# Files


def test_a_project_has_a_dozen_small_files(project):
    texts = contents(project[0])
    assert set(texts) == {name.format(name="shoe_shop") for name in FILES}
    code = [text for name, text in texts.items() if name.endswith((".py", ".yaml", ".yml"))]
    assert sum(len(text.splitlines()) for text in code) <= 500
    assert max(len(text.splitlines()) for text in texts.values()) <= 100


def test_no_placeholder_is_left(project):
    for name, text in contents(project[0]).items():
        assert not {"my_project", "My project", "My Name"} & set(text.split('"')), name
        assert "my_project" not in text + name and "My project" not in text


def test_the_answers_are_written_where_they_belong(project):
    texts = contents(project[0])
    table = tomllib.loads(texts["pyproject.toml"])
    assert table["project"]["name"] == "shoe_shop"
    assert table["project"]["description"] == "Shoe shop: boots & more"
    assert table["project"]["authors"] == [{"name": "Ana Núñez"}]
    assert table["tool"]["bn_lightning"]["author"] == "Ana Núñez"
    assert texts["README.md"].startswith("# Shoe shop: boots & more\n")


def test_texts_may_contain_quotes_and_backslashes(tmp_path):
    title, author = 'Say """hi""" \\n', 'Ana "Nu" \\Núñez"'
    new(tmp_path / "shop", "--title", title, "--author", author)
    texts = contents(tmp_path / "shop")
    docstring = ast.get_docstring(ast.parse(texts["shop/__init__.py"]))
    assert docstring.splitlines()[0] == title
    table = tomllib.loads(texts["pyproject.toml"])
    assert table["project"]["description"] == table["tool"]["bn_lightning"]["title"] == title
    assert table["project"]["authors"] == [{"name": author}]
    assert texts["README.md"].startswith(f"# {title}\n")
    # The same texts are written again.
    assert "has the newest files" in new(tmp_path / "shop", "--update").stdout


def test_the_description_in_help_is_the_docstring_of_the_package(project, monkeypatch):
    monkeypatch.syspath_prepend(project[0])
    printed = run_here("--help", cwd=project[0], module="shoe_shop").stdout
    assert printed.startswith("usage: python -m shoe_shop COMMAND")
    assert "\n\nShoe shop: boots & more\n\n" in printed


def test_each_file_says_what_to_change_in_its_first_lines(project):
    for name, text in contents(project[0]).items():
        beginning = " ".join(text.splitlines()[:4])
        assert any(word in beginning for word in ("hange", "dd", "# Shoe shop")), name


def test_the_printed_commands_name_the_folder(project):
    folder, printed = project
    assert printed.startswith(f"created {folder}: {len(FILES)} files")
    assert f"\n  cd {folder}\n" in printed
    assert ".venv/bin/python -m shoe_shop fit\n" in printed


def test_dotfiles_and_executable_bits_survive(tmp_path, template):
    script = template / ".ci/run-my_project"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\necho my_project\n")
    script.chmod(0o755)
    new(tmp_path / "shop")
    copy = tmp_path / "shop/.ci/run-shop"
    assert copy.read_text() == "#!/bin/sh\necho shop\n"
    assert os.access(copy, os.X_OK) and not os.access(tmp_path / "shop/README.md", os.X_OK)


def test_caches_in_the_template_are_not_copied(tmp_path, template):
    cache = template / "my_project/__pycache__/x.pyc"
    cache.parent.mkdir()
    cache.write_bytes(bytes(range(256)))
    new(tmp_path / "shop")
    assert not list(tmp_path.rglob("__pycache__"))


def test_no_name_is_excluded_by_the_gitignore(project):
    ignored = re.findall(r"^/?(\w+)/$", (project[0] / ".gitignore").read_text(), flags=re.M)
    assert {"build", "data", "runs"} <= set(ignored)
    assert {name for name in ignored if name[0] != "_"} <= set(names.TAKEN)


# Repository


def test_both_branches_have_the_same_commit(project):
    folder, _ = project
    branches = git(folder, "for-each-ref", "--format=%(refname) %(objectname)").splitlines()
    refs, commits = zip(*map(str.split, branches), strict=True)
    assert refs == ("refs/heads/main", "refs/heads/template")
    assert len(set(commits)) == 1
    assert git(folder, "status", "--porcelain", "--branch") == "## main"


def test_a_commit_needs_no_identity_and_runs_no_hook(tmp_path, monkeypatch):
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    for name in ("pre-commit", "commit-msg"):
        (hooks / name).write_text("#!/bin/sh\nexit 1\n")
        (hooks / name).chmod(0o755)
    (tmp_path / "ignored").write_text("*.yaml\n")
    (tmp_path / "config").write_text(
        f"[core]\nhooksPath = {hooks}\nexcludesFile = {tmp_path}/ignored\n"
        "[commit]\ngpgsign = true\n[user]\nuseConfigOnly = true\n[init]\ndefaultBranch = trunk\n"
    )
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "config"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    # As in a hook of another repository.
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "other/index"))
    new(tmp_path / "shop", "--author", "Ana")
    monkeypatch.delenv("GIT_DIR")
    monkeypatch.delenv("GIT_INDEX_FILE")
    assert len(git(tmp_path / "shop", "ls-files").splitlines()) == len(FILES)
    assert git(tmp_path / "shop", "log", "--format=%ae") == "none@localhost"
    assert not (tmp_path / "other").exists()


def test_without_git_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = new(tmp_path / "a/shop", check=False)
    assert (done.returncode, done.stderr[:24]) == (2, "error: git is not instal")
    assert not (tmp_path / "a").exists()


def test_a_failure_of_git_leaves_nothing(tmp_path, monkeypatch):
    real = subprocess.run(["which", "git"], capture_output=True, text=True).stdout.strip()
    fake = tmp_path / "bin/git"
    fake.parent.mkdir()
    fails = '[ "$1" = reset ] && echo no space >&2 && exit 1'
    fake.write_text(f'#!/bin/sh\n{fails}\nexec {real} "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    (tmp_path / "empty").mkdir()
    for path in ("a/b/shop", "empty"):
        done = new(tmp_path / path, "--name", "shop", check=False)
        assert done.returncode == 1 and "git reset failed" in done.stderr
        assert "no space" in done.stderr and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "empty"]
    assert not list((tmp_path / "empty").iterdir())


# Refusals


def test_an_empty_folder_is_filled_even_if_it_is_the_current_one(tmp_path):
    folder = tmp_path / "shop"
    folder.mkdir()
    before = folder.stat().st_ino
    run_here("new", ".", cwd=folder)
    assert folder.stat().st_ino == before
    assert (folder / "shop/__main__.py").is_file()
    assert git(folder, "status", "--porcelain") == ""


@pytest.mark.parametrize("file", ["shop/notes.txt", "shop"])
def test_a_path_that_exists_is_refused(tmp_path, file):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    done = new(tmp_path / "shop", check=False)
    assert done.returncode == 2 and "exists and is" in done.stderr
    assert [found for found in tmp_path.rglob("*") if found.is_file()] == [path]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("shoe-shop", "shoe_shop would be one"),
        ("1st_shop", "st_shop would be one"),
        ("größe", "the name of a Python module"),
        ("_shop", "shop would be one"),
        ("..", "the name of a Python module"),
        ("lambda", "a keyword of Python"),
        ("random", "standard library"),
        ("Random", "standard library"),
        ("torch", "an installed package"),
        ("bn_lightning", "an installed package"),
        ("Pillow", "an installed package"),
        ("PIL", "an installed package"),
        ("tests", "another folder"),
        ("data", "another folder"),
        ("Runs", "another folder"),
        ("a" * 41, "more than 40 characters"),
    ],
)
def test_a_name_that_cannot_be_imported_is_refused(tmp_path, name, reason):
    done = new(tmp_path / "shop", "--name", name, check=False)
    assert done.returncode == 2 and reason in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_module_on_the_path_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/helpers_of_mine.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    done = new(tmp_path / "helpers_of_mine", check=False)
    assert done.returncode == 2 and "an installed package" in done.stderr


@pytest.mark.parametrize("title", ["two\nlines", "a\x1b[31m", "x" * 71, "  "])
def test_a_title_that_is_not_a_short_line_is_refused(tmp_path, title):
    done = new(tmp_path / "shop", "--title", title, check=False)
    assert done.returncode == 2 and "The title is" in done.stderr
    assert not list(tmp_path.iterdir())
