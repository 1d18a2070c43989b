"""Writes the files of a project: those of the template, with the answers filled in."""

import re
from pathlib import Path

from bn_lightning.projects import requirement
from bn_lightning.projects.answers import Answers

TEMPLATE = Path(__file__).parents[1] / "template"
NAME = "my_project"


def render(answers: Answers, folder: Path) -> None:
    """Write the files of the template to a folder."""
    values = _values(answers)
    # Strings of Python and of TOML have the same escapes.
    escaped = {
        old: new if '"' in old else new.replace("\\", "\\\\").replace('"', '\\"')
        for old, new in values.items()
    }
    # Files such as __pycache__ are copied too. The .gitignore in the template excludes them from
    # the commit.
    for source in sorted(TEMPLATE.rglob("*")):
        if not source.is_file():
            continue
        name = str(source.relative_to(TEMPLATE))
        target = folder / name.replace(NAME, answers.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = source.read_bytes().decode("utf-8", "surrogateescape")
        text = _filled(text, escaped if source.suffix in (".py", ".toml") else values)
        target.write_bytes(text.encode("utf-8", "surrogateescape"))
        target.chmod(target.stat().st_mode | (source.stat().st_mode & 0o111))


def _filled(text: str, values: dict[str, str]) -> str:
    pattern = "|".join(map(re.escape, values))
    return re.sub(pattern, lambda found: values[found[0]], text)


def _values(answers: Answers) -> dict[str, str]:
    """Return what replaces each text of the template."""
    chosen = answers.requirement
    return {
        NAME: answers.name,
        "My project": answers.title,
        "My Name": answers.author,
        '"bn_lightning",': f'"{requirement.dependency(chosen)}",',
        'requirement = "bn_lightning"': f'requirement = "{chosen}"',
        "installed from `bn_lightning`": f"installed from `{chosen}`",
        "install -e .": f"install {requirement.pip_arguments(chosen)}-e .",
        "install --upgrade bn_lightning": (
            f"install --upgrade {requirement.upgrade_arguments(chosen)}"
        ),
    }
