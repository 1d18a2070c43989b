"""Names that a package of a user can have."""

import keyword
import re
import sys
from importlib import util
from importlib.metadata import distributions
from pathlib import Path

from packaging.utils import canonicalize_name

from bn_lightning.errors import UserError

# The package is a module and a distribution. A distribution begins and ends with a letter or digit.
VALID = re.compile(r"[a-z]([a-z0-9_]*[a-z0-9])?", flags=re.ASCII | re.IGNORECASE)
# The lines of a project are short enough for ruff.
MAX_LENGTH = 40
# Other folders of a project, and folders that its .gitignore excludes.
TAKEN = ("build", "configs", "data", "pictures", "runs", "tests")


def refuse(name: str) -> None:
    """Refuse a name that the package of a new project cannot have.

    Raises:
        UserError: the name is not a valid module name, is a keyword, or would hide a
            module of the standard library or an installed package.
    """
    problem = _problem(name)
    if problem:
        raise UserError(
            f"The project cannot have the name {name!r}: {problem}.\n"
            "Choose another name, for example --name shoe_shop."
        )


def _problem(name: str) -> str | None:
    if not VALID.fullmatch(name):
        valid = re.sub(r"\W+|_+", "_", name, flags=re.ASCII).strip("_").lstrip("0123456789_")
        hint = f" {valid} would be one" if VALID.fullmatch(valid) else ""
        return (
            "it must be the name of a Python module, of letters, digits and underscores, that "
            f"begins with a letter and does not end with an underscore.{hint}"
        ).removesuffix(".")
    if len(name) > MAX_LENGTH:
        return f"it has more than {MAX_LENGTH} characters"
    if keyword.iskeyword(name):
        return "it is a keyword of Python"
    if name.lower() in TAKEN:
        return "it is the name of another folder in each project"
    if name.lower() in {module.lower() for module in sys.stdlib_module_names}:
        return "Python's standard library has a module of that name"
    if _is_installed(name):
        return "an installed package has that name"
    return None


def _is_installed(name: str) -> bool:
    wanted = canonicalize_name(name)
    if any(canonicalize_name(found.name) == wanted for found in distributions() if found.name):
        return True
    # The current folder is searched last. It may contain the folder of the project.
    spec = util.find_spec(name)
    places = [*(spec.submodule_search_locations or []), spec.origin] if spec else []
    return any(Path(place).parent.resolve() != Path.cwd() for place in places if place)
