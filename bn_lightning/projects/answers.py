"""The answers from which the files of a project are written. Its pyproject.toml contains them."""

import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Self

from bn_lightning.errors import UserError
from bn_lightning.projects import names

MAX_LENGTH = 70


@dataclass(frozen=True)
class Answers:
    """What `new` fills into the template.

    Attributes:
        name: name of the package.
        title: title in the README, and description in --help.
        author: name of the author.
        requirement: how bn_lightning is installed; see `requirement`.

    Raises:
        UserError: a text does not fit into the files.
    """

    name: str
    title: str
    author: str
    requirement: str

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str) or not value.strip() or not value.isprintable():
                problem = "it must be a text of one line"
            elif field.name == "requirement" and {'"', "\\"} & set(value):
                problem = 'it must not contain " or \\'
            elif field.name == "name" and not names.VALID.fullmatch(value):
                problem = "it must be the name of a Python module"
            elif field.name in ("title", "author") and len(value) > MAX_LENGTH:
                problem = f"it must have at most {MAX_LENGTH} characters"
            else:
                continue
            raise UserError(
                f"The {field.name} is {value!r}; {problem}. Change it with --{field.name}."
            )

    @classmethod
    def read(cls, project: Path) -> Self:
        """Read the answers in the pyproject.toml of a project.

        Raises:
            UserError: the folder is not that of a project that `new` has created.
        """
        file = project / "pyproject.toml"
        try:
            table = tomllib.loads(file.read_text(encoding="utf-8"))["tool"]["bn_lightning"]
            return cls(**{field.name: table[field.name] for field in fields(cls)})
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"'{file}' cannot be read: {error}") from error
        except (KeyError, TypeError) as error:
            needed = ", ".join(field.name for field in fields(cls))
            raise UserError(
                f"'{file}' has no table [tool.bn_lightning] with {needed}. Without it, the files "
                "cannot be written again. Add it, as `new` has written it."
            ) from error

    def changed(self, **given: str | None) -> Self:
        """Return the answers with those that are given and not None.

        Raises:
            UserError: the name is another one.
        """
        name = given["name"]
        if name not in (None, self.name):
            raise UserError(
                f"The name of the project is {self.name!r}, and --update cannot change it to "
                f"{name!r}. Remove --name."
            )
        return replace(self, **{key: value for key, value in given.items() if value is not None})
