"""Workflows, forms for issues, and dependabot.yml: their schemas, and audits of security."""

import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.conftest import REPOSITORY

GITHUB = REPOSITORY / ".github"
WORKFLOWS = [
    *sorted((GITHUB / "workflows").glob("*.yml")),
    REPOSITORY / "bn_lightning/template/.github/workflows/ci.yml",
]
CONFIG = GITHUB / "ISSUE_TEMPLATE/config.yml"
FORMS = sorted({*(GITHUB / "ISSUE_TEMPLATE").glob("*.yml")} - {CONFIG})
SCHEMAS = {
    "vendor.github-workflows": WORKFLOWS,
    "custom.github-workflows-require-timeout": WORKFLOWS,
    "vendor.github-issue-forms": FORMS,
    "vendor.github-issue-config": [CONFIG],
    "vendor.dependabot": [GITHUB / "dependabot.yml"],
}
# An action, the hash of a commit, and its version
PINNED = re.compile(r"uses: ([\w/-]+)@([0-9a-f]{40}) # (v\d+\.\d+\.\d+)\n")


def validate(schema, *files):
    """Run check-jsonschema with one of its built-in schemas."""
    command = ["check_jsonschema", "--builtin-schema", schema, *files]
    return subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)


def audit(*files):
    """Run zizmor, which looks for vulnerabilities in workflows. It exits with 0 without any."""
    zizmor = shutil.which("zizmor", path=sysconfig.get_path("scripts"))
    options = ["--offline", "--no-progress", "--strict-collection", "--persona", "pedantic"]
    return subprocess.run([zizmor, *options, *files], capture_output=True, text=True)


def edited(folder, old, new):
    """Write the project's workflow to a folder with one text replaced, and return its path."""
    text = WORKFLOWS[0].read_text(encoding="utf-8")
    assert old in text
    path = folder / ".github/workflows/ci.yml"
    path.parent.mkdir(parents=True)
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


# Schemas


@pytest.mark.slow
@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_are_valid(schema):
    done = validate(schema, *SCHEMAS[schema])
    assert SCHEMAS[schema] and done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("schema", [schema for schema in SCHEMAS if "workflows" in schema])
def test_a_job_without_a_time_limit_is_reported(tmp_path, schema):
    new = "timeout-minute" if schema.startswith("vendor") else "continue-on-error: true #"
    done = validate(schema, edited(tmp_path, "timeout-minutes", new))
    assert done.returncode == 1 and "$.jobs.everything" in done.stdout, done.stdout


def test_forms_have_distinct_names_and_labels_that_github_creates():
    forms = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in FORMS]
    assert len({form["name"] for form in forms}) == len(forms) == 3
    assert {label for form in forms for label in form["labels"]} == {"bug", "enhancement"}
    for form in forms:
        names = [field["id"] for field in form["body"] if field["type"] != "markdown"]
        assert len(set(names)) == len(names)


# Security


@pytest.mark.slow
def test_zizmor_has_no_findings():
    done = audit(GITHUB, *WORKFLOWS)
    assert done.returncode == 0, done.stdout + done.stderr
    for path in (*WORKFLOWS, GITHUB / "dependabot.yml"):
        assert f"completed {path}" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "finding"),
    [
        ("@3d3c42e5aac5ba805825da76410c181273ba90b1 # v7.0.1", "@v7", "unpinned-uses"),
        ("persist-credentials: false", "fetch-depth: 1", "artipacked"),
        ("contents: read", "contents: write", "excessive-permissions"),
        ("bash .ci/run", "echo ${{ github.head_ref }}", "template-injection"),
    ],
)
def test_zizmor_finds(tmp_path, old, new, finding):
    done = audit(edited(tmp_path, old, new))
    assert done.returncode != 0 and f"[{finding}]" in done.stdout, done.stdout


def test_actions_are_pinned_and_each_has_one_version():
    versions = {}
    for path in WORKFLOWS:
        text = path.read_text(encoding="utf-8")
        pinned = PINNED.findall(text)
        assert len(pinned) == text.count("uses:") > 0, path
        for action, commit, version in pinned:
            versions.setdefault(action, set()).add((commit, version))
    assert {action: len(found) for action, found in versions.items()} == dict.fromkeys(versions, 1)


# Versions


def test_the_oldest_python_is_the_lowest_that_the_package_allows():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    workflow = yaml.safe_load(WORKFLOWS[0].read_text(encoding="utf-8"))
    matrix = workflow["jobs"]["quick"]["strategy"]["matrix"]
    pythons = {entry["versions"]: entry["python"] for entry in matrix["include"]}
    assert project["requires-python"] == f">={pythons['oldest']}"
    assert set(matrix["versions"]) == {"oldest", "newest"} == set(pythons)
    assert {system.partition("-")[0] for system in matrix["os"]} == {"ubuntu", "macos", "windows"}


def test_the_guide_for_contributors_names_existing_files():
    for page in ("CONTRIBUTING.md", "SECURITY.md"):
        text = (GITHUB / page).read_text(encoding="utf-8")
        paths = re.findall(r"`([\w.]+/[\w./]+)`", text)
        assert len(paths) >= 3
        for path in paths:
            assert Path(REPOSITORY, path).exists(), (page, path)
