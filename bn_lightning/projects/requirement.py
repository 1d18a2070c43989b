"""How a project installs bn_lightning: by name, from an address, or from a path.

In the answers of a project, a requirement is `bn_lightning`, with or without a version, or
`bn_lightning @ ADDRESS`, or else a path, after `-e ` if it is installed in editable mode.
"""

import json
import shlex
import tomllib
from importlib.metadata import distributions
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from bn_lightning import __version__
from bn_lightning.errors import UserError

PACKAGE = "bn_lightning"
EDITABLE = "-e "


def given(text: str, project: Path) -> str:
    """Return a requirement of the user as it is written in the answers.

    Raises:
        UserError: it is neither a requirement of this package nor an existing path.
    """
    text = text.strip()
    scheme = urlsplit(text).scheme
    if "+" in scheme or scheme in ("http", "https"):
        text = f"{PACKAGE} @ {text}"
    try:
        found = Requirement(text)
    except InvalidRequirement:
        found = None
    if found is not None and canonicalize_name(found.name) == canonicalize_name(PACKAGE):
        if found.url is None or urlsplit(found.url).scheme != "file":
            return PACKAGE + text.removeprefix(found.name)
        text = found.url
    path = Path(_path_of(text) if text.startswith("file:") else text.removeprefix(EDITABLE))
    if not _is_package(path):
        raise UserError(
            f"The requirement {text!r} is neither a path nor a requirement of {PACKAGE}.\n"
            f"Use {PACKAGE}, with or without a version, such as '{PACKAGE}>={__version__}'; an "
            f"address, such as git+https://...; or the path of a clone or a wheel of {PACKAGE}."
        )
    return _local(path, project, text.startswith(EDITABLE))


def _is_package(path: Path) -> bool:
    """Return whether a path is a clone, a wheel or an archive of this package."""
    name = path.name
    if not path.is_file():
        try:
            text = (path / "pyproject.toml").read_text(encoding="utf-8")
            name = tomllib.loads(text)["project"]["name"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
    return canonicalize_name(name).startswith(canonicalize_name(PACKAGE))


def installed(project: Path) -> str:
    """Return how this package is installed, by PEP 610's `direct_url.json`."""
    # The egg-info in a clone is found too, and has no direct_url.json.
    for distribution in distributions(name=PACKAGE):
        text = distribution.read_text("direct_url.json")
        if text is not None:
            return _of_direct_url(json.loads(text), project)
    clone = Path(__file__).parents[2]
    if (clone / "pyproject.toml").is_file():  # not installed, but run from a clone
        return _local(clone, project, is_editable=True)
    return PACKAGE


def _of_direct_url(origin: dict[str, Any], project: Path) -> str:
    url = origin["url"]
    if urlsplit(url).scheme == "file" and "vcs_info" not in origin:
        is_editable = bool(origin.get("dir_info", {}).get("editable"))
        return _local(Path(_path_of(url)), project, is_editable)
    if "vcs_info" in origin:
        info = origin["vcs_info"]
        revision = info.get("requested_revision")
        url = f"{info['vcs']}+{url}" + (f"@{revision}" if revision else "")
    folder = origin.get("subdirectory")
    return f"{PACKAGE} @ {url}" + (f"#subdirectory={folder}" if folder else "")


def _path_of(url: str) -> str:
    return url2pathname(unquote(urlsplit(url).path))


def _local(path: Path, project: Path, is_editable: bool) -> str:
    path = path.resolve()
    # A project and a clone beside it may be moved together.
    if path.is_relative_to(project.parent):
        path = Path("..", path.relative_to(project.parent))
    return f"{EDITABLE if is_editable else ''}{path.as_posix()}"


def is_path(requirement: str) -> bool:
    """Return whether a requirement in the answers is a path."""
    return not requirement.startswith(PACKAGE)


def dependency(requirement: str) -> str:
    """Return a requirement in the answers as a dependency in pyproject.toml.

    By name or from a path, the versions are those up to the next one with breaking changes.
    """
    if requirement != PACKAGE and not is_path(requirement):
        return requirement
    version = Version(__version__)
    limit = f"0.{version.minor + 1}" if version.major == 0 else str(version.major + 1)
    return f"{PACKAGE}>={version.public},<{limit}"


def pip_arguments(requirement: str) -> str:
    """Return the arguments with which pip installs a path, or nothing for other requirements."""
    return f"{upgrade_arguments(requirement)} " if is_path(requirement) else ""


def upgrade_arguments(requirement: str) -> str:
    """Return the arguments with which pip upgrades this package."""
    if requirement.startswith(EDITABLE):
        return f"{EDITABLE}{shlex.quote(requirement.removeprefix(EDITABLE))}"
    return shlex.quote(requirement)
