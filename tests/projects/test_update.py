"""`new --update`: the branch `template`, and what git merges."""

import re

import pytest

import bn_lightning
from tests.support.projects import commit, edit, git, merge, new


@pytest.fixture
def project(tmp_path, template):
    new(tmp_path / "shop", "--requirement", "bn_lightning", "--author", "Ana")
    return tmp_path / "shop"


def test_without_a_new_template_there_is_nothing_to_merge(project):
    before = git(project, "rev-parse", "template")
    printed = new(project, "--update").stdout
    assert "has the newest files" in printed and "nothing to merge" in printed
    assert git(project, "rev-parse", "template") == before


def test_changes_of_the_template_are_merged_with_those_of_the_owner(project, template):
    edit(project / "shop/experiment.py", '"data.batch_size": 64', '"data.batch_size": 32')
    (project / "shop/extra.py").write_text("")
    commit(project)
    edit(
        template / "my_project/experiment.py", '"trainer.max_epochs": 5', '"trainer.max_epochs": 6'
    )
    (template / "CITATION.cff").write_text("title: My project\n")
    before = git(project, "rev-parse", "HEAD")
    printed = new(project, "--update").stdout
    assert printed.endswith("\n  git merge template\n")
    assert "CITATION.cff" in printed and "shop/experiment.py" in printed
    # The owner's branch and files are as they were.
    assert git(project, "rev-parse", "HEAD") == before
    assert git(project, "status", "--porcelain") == ""
    assert merge(project) == []
    text = (project / "shop/experiment.py").read_text()
    assert '"data.batch_size": 32' in text and '"trainer.max_epochs": 6' in text
    assert (project / "shop/extra.py").exists()
    assert (project / "CITATION.cff").read_text() == "title: Shop\n"
    assert "nothing to merge" in new(project, "--update").stdout


def test_an_update_that_is_not_merged_is_offered_again(project, template):
    edit(template / "README.md", "## Files", "## All files")
    new(project, "--update")
    assert "git merge template" in new(project, "--update").stdout
    assert len(git(project, "log", "--format=%H", "template").splitlines()) == 2


def test_the_same_line_is_a_conflict_with_both_versions(project, template):
    edit(project / "shop/experiment.py", '"model.lr": 0.05', '"model.lr": 0.3')
    commit(project)
    edit(template / "my_project/experiment.py", '"model.lr": 0.05', '"model.lr": 0.02')
    new(project, "--update")
    assert merge(project) == ["shop/experiment.py"]
    text = (project / "shop/experiment.py").read_text()
    assert '"model.lr": 0.3' in text and '"model.lr": 0.02' in text


def test_a_removed_file_stays_removed_unless_the_template_changed_it(project, template):
    for name in ("shop/norms.py", "configs/debug.yaml"):
        (project / name).unlink()
    commit(project)
    edit(template / "configs/debug.yaml", "limit_train_batches: 30", "limit_train_batches: 20")
    edit(template / "README.md", "## Files", "## All files")
    new(project, "--update")
    assert merge(project) == ["configs/debug.yaml"]
    assert not (project / "shop/norms.py").exists()


def test_answers_are_kept_and_changed_by_flags(project):
    new(project, "--update", "--title", "Boots", "--requirement", "git+https://example.com/x.git")
    assert merge(project) == []
    text = (project / "pyproject.toml").read_text()
    assert text.count("bn_lightning @ git+https://example.com/x.git") == 2
    assert 'description = "Boots"' in text and '{ name = "Ana" }' in text
    done = new(project, "--update", "--name", "boots", check=False)
    assert done.returncode == 2 and "cannot change it to 'boots'" in done.stderr


def test_a_new_version_raises_the_required_one(project, monkeypatch):
    monkeypatch.setattr("bn_lightning.projects.requirement.__version__", "0.7.2")
    edit(project / "pyproject.toml", "# Add the packages", '"pandas>=2",\n    # Add the packages')
    commit(project)
    new(project, "--update")
    assert merge(project) == []
    text = (project / "pyproject.toml").read_text()
    assert '"bn_lightning>=0.7.2,<0.8"' in text and '"pandas>=2"' in text


def test_uncommitted_changes_are_refused(project, template):
    edit(template / "README.md", "## Files", "## All files")
    (project / "untracked.txt").write_text("")
    before = git(project, "rev-parse", "template")
    edit(project / "README.md", "## Start", "## Begin")
    done = new(project, "--update", check=False)
    assert done.returncode == 2 and "uncommitted changes:\n M README.md\n" in done.stderr
    assert git(project, "rev-parse", "template") == before
    git(project, "add", "README.md")
    assert new(project, "--update", check=False).returncode == 2
    git(project, "checkout", "HEAD", "README.md")
    assert new(project, "--update").returncode == 0


def test_a_checked_out_template_is_not_changed(project, template):
    git(project, "switch", "template")
    edit(template / "README.md", "## Files", "## All files")
    before = git(project, "rev-parse", "template")
    done = new(project, "--update", check=False)
    assert done.returncode == 2 and "is checked out" in done.stderr
    assert git(project, "rev-parse", "template") == before


def test_a_clone_uses_the_branch_of_the_remote_repository(project, template, tmp_path):
    git(tmp_path, "clone", "--quiet", project, "clone")
    edit(template / "README.md", "## Files", "## All files")
    new(tmp_path / "clone", "--update")
    assert merge(tmp_path / "clone") == []
    parents = git(tmp_path / "clone", "log", "--format=%H", "template").splitlines()[1:]
    assert parents == [git(project, "rev-parse", "template")]
    # A newer commit of the remote repository is used too.
    new(project, "--update")
    edit(template / "README.md", "## All files", "## Each file")
    new(project, "--update")
    git(tmp_path / "clone", "reset", "--hard", "origin/main")
    git(tmp_path / "clone", "branch", "--force", "template", "origin/template")
    git(tmp_path / "clone", "fetch", "--quiet")
    assert "has the newest files" in new(tmp_path / "clone", "--update").stdout
    newest = git(project, "rev-parse", "template")
    assert git(tmp_path / "clone", "rev-parse", "template") == newest


def test_a_missing_branch_is_reported(project):
    git(project, "branch", "--delete", "template")
    done = new(project, "--update", check=False)
    assert done.returncode == 2 and "has no branch template" in done.stderr


def test_other_folders_are_refused(tmp_path, project):
    (tmp_path / "other").mkdir()
    for path, reason in (
        (tmp_path / "nowhere", "There is no folder"),
        (tmp_path / "other", "is not the top folder of a git repository"),
        (project / "shop", "is not the top folder of a git repository"),
    ):
        done = new(path, "--update", check=False)
        assert done.returncode == 2 and reason in done.stderr, done.stderr
    git(tmp_path / "other", "init", "--quiet")
    for text in (None, "[tool.bn_lightning]\nname = 'x'", "[tool", '[tool]\nbn_lightning = "x"'):
        if text is not None:
            (tmp_path / "other/pyproject.toml").write_text(text)
        done = new(tmp_path / "other", "--update", check=False)
        assert done.returncode == 2 and "pyproject.toml" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["../../outside", "a/b", ""])
def test_a_name_in_a_project_of_others_cannot_leave_the_folder(project, name, tmp_path):
    text = (project / "pyproject.toml").read_text()
    text = re.sub(r'(tool.bn_lightning\]\nname = )"shop"', rf'\1"{name}"', text)
    (project / "pyproject.toml").write_text(text)
    commit(project)
    done = new(project, "--update", check=False)
    assert done.returncode == 2 and "The name is" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["shop"]


def test_the_commit_names_the_version(project, template):
    edit(template / "README.md", "## Files", "## All files")
    new(project, "--update")
    subject = git(project, "log", "-1", "--format=%s", "template")
    assert subject == f"Update the template to bn_lightning {bn_lightning.__version__}"
