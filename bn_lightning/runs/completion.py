"""Shell completion of commands and settings: a script that the package shtab writes.

The script is static, because a program that is asked at each key would import PyTorch each
time. jsonargparse can write one too. For Lightning's trainer, it would have the arguments
of each callback and logger, and a size of 60 MB.
"""

import argparse
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import shtab

from bn_lightning.errors import UserError
from bn_lightning.runs import experiment, schema
from bn_lightning.runs.parser import Parser
from bn_lightning.runs.run import CLI
from bn_lightning.runs.settings import TRAINER_DEFAULTS

# Commands with settings, and the command that has the same ones.
WITH_SETTINGS = {
    "fit": "fit",
    "validate": "validate",
    "test": "test",
    "predict": "test",
    "compare": "fit",
    "sweep": "fit",
}
# The values of these settings are files and folders.
FILES = ("config", "ckpt_path", "model.init_from")
FOLDERS = ("resume", "data.root", "trainer.default_root_dir")


class _Built(Exception):
    """The parser is built."""


class _Builder(CLI):
    """A command line that builds its parser only."""

    def parse_arguments(self, *args: Any) -> NoReturn:
        self.add_command_arguments()
        raise _Built(self._parser(self.commands[0]))


def parser_of(reference: str, command: str = "fit") -> Parser:
    """Return the parser of fit, validate or test for an experiment, `package.module:NAME`."""
    try:
        _Builder(reference, [command], trainer_defaults=TRAINER_DEFAULTS)
    except _Built as built:
        parser: Parser = built.args[0]
        return parser
    raise AssertionError


def script(arguments: list[str], reference: str, commands: Mapping[str, str]) -> str:
    """Return a script that completes commands and settings in a shell.

    It completes the name of the experiment's package, which is a console script or an
    alias of `python -m PACKAGE`.

    Args:
        arguments: the name of the shell.
        reference: import path of the experiment.
        commands: the help text of each command.

    Raises:
        UserError: the shell is unknown.
    """
    if len(arguments) != 1 or arguments[0] not in shtab.SUPPORTED_SHELLS:
        raise UserError(
            f"--print_completion needs the name of a shell: {', '.join(shtab.SUPPORTED_SHELLS)}."
        )
    program = argparse.ArgumentParser(experiment.package_of(reference))
    parsers = program.add_subparsers()
    for name, text in commands.items():
        command = parsers.add_parser(name, help=text)
        if name in WITH_SETTINGS:
            described = schema.of(parser_of(reference, WITH_SETTINGS[name]))
            del described["properties"]["sweep"]  # a section of configs, not flags
            _complete(command.add_argument("--config", help="YAML file with settings."), shtab.FILE)
            for setting, details in _settings(described):
                _add(command, setting, details)
        else:
            _complete(command.add_argument("files", nargs="*"), shtab.FILE)
    return str(shtab.complete(program, shell=arguments[0]))


def _settings(group: schema.Schema, prefix: str = "") -> Iterator[tuple[str, schema.Schema]]:
    """Yield the name and the schema of each setting of a group and of those in it."""
    for name, details in group["properties"].items():
        is_group = "properties" in details and "class_path" not in details["properties"]
        if is_group:
            yield from _settings(details, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", details


def _add(command: argparse.ArgumentParser, name: str, details: schema.Schema) -> None:
    text = details.get("description", "").replace("%", "%%")
    choices = [value for value in details.get("enum", []) if value is not None]
    if details.get("type") == "boolean":
        choices = ["true", "false"]
    action = command.add_argument(f"--{name}", help=text, choices=choices or None)
    if name in FILES or name in FOLDERS:
        _complete(action, shtab.FILE if name in FILES else shtab.DIRECTORY)


def _complete(action: argparse.Action, what: Any) -> None:
    action.complete = what  # type: ignore[attr-defined]
