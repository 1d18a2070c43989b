"""The argument parser of a run: its help and its error messages."""

import argparse
import copy
import difflib
import re
from typing import Any, NoReturn

from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser

from bn_lightning.errors import UserError

# Help texts that replace those of Lightning and jsonargparse. `--help` shows these
# settings of the trainer only, and `--help.trainer` shows all of them.
HELP = {
    "config": "YAML file with settings. Flags override them.",
    "print_config": "Print all settings as YAML and exit.",
    "trainer.max_epochs": "Number of epochs; -1 for no limit.",
    "trainer.max_steps": "Number of optimizer steps; -1 for no limit.",
    "trainer.max_time": "Time limit as DD:HH:MM:SS.",
    "trainer.accelerator": "`cpu`, `gpu`, `mps` or `auto`.",
    "trainer.devices": "Number of devices, or `auto`. On a CPU, the number of processes.",
    "trainer.precision": "`32-true` (the default), `bf16-mixed`, `16-mixed`, `64-true` or others.",
    "trainer.sync_batchnorm": "Synchronize the statistics of norm layers between processes.",
    "trainer.default_root_dir": "Folder in which all runs are stored.",
    "trainer.callbacks": "Import path of a callback to add: `--trainer.callbacks+=PATH`.",
    "trainer.fast_dev_run": "Run one batch of training, validation and test; write no files.",
}


class HelpFormatter(DefaultHelpFormatter):
    """A formatter that shows the text and the default of each setting, without its type."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)  # type: ignore[no-untyped-call]

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "VALUE"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = _text(action)
        has_default = action.default not in (None, argparse.SUPPRESS)
        return text + (" (default: %(default)s)." if has_default else ".")


def description(action: argparse.Action) -> str:
    """Return the help text of a setting as one line, without its default; "" without a text."""
    text = " ".join(_text(action).replace("%%", "%").split())
    # Lightning's texts state the defaults of Lightning.
    text = re.sub(r" ?Default: ``.*``$", "", text).removesuffix(".")
    return f"{text}." if text else ""


def _text(action: argparse.Action) -> str:
    name = (action.option_strings or [""])[-1].strip("-+")
    text = (HELP.get(name) or action.help or "").removesuffix(".")
    return text[:1].upper() + text[1:]


class Parser(LightningArgumentParser):
    """A parser with short help texts. Its error messages suggest similar settings."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=HelpFormatter, **settings)

    def format_help(self, *formatter: Any) -> str:
        """Return the help: own settings first, then a selection of the trainer's."""
        trainer = (self.groups or {}).get("trainer")
        if trainer is None or self.formatter_class is not HelpFormatter:
            return super().format_help(*formatter)
        groups = self._action_groups
        own = [g for g in groups if g is not trainer and g.title != "Linked arguments"]
        self._action_groups = [*own, _selected(trainer)]
        try:
            return super().format_help(*formatter)
        finally:
            self._action_groups = groups

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        known = [option for action in parser._actions for option in action.option_strings]
        wrong = re.findall(r"--?([\w.]+)|[Kk]ey ['\"]([\w.]+)", message)
        near = {f"--{n}": None for a, b in wrong for n in _nearest(a or b, known)}
        hint = f"Did you mean {' or '.join(near)}?\n" if near else ""
        program = parser.prog.replace(" [options]", "")
        flag = "--help.trainer" if "trainer." in message else "--help"
        raise UserError(f"{message}\n{hint}All settings: {program} {flag}") from ex


def _nearest(name: str, options: list[str]) -> list[str]:
    known = [option.removeprefix("--") for option in options if option.startswith("--")]
    if name in known:
        return []
    head = name.partition(".")[0]
    complete = [option for option in known if option.endswith(f".{head}")]
    has_group = any(option.startswith(f"{head}.") for option in known)
    if complete and not has_group:
        # The group is missing: --lr, --norm_args.eps.
        return [option + name.removeprefix(head) for option in complete]
    group, _, last = name.rpartition(".")
    in_group = [option for option in known if group and option.rpartition(".")[0] == group]
    by_last = {option.rpartition(".")[2]: option for option in in_group or known}
    return [by_last[n] for n in difflib.get_close_matches(last, by_last, n=2, cutoff=0.7)]


def _selected(trainer: Any) -> Any:
    """Return the group of the trainer's settings with only those in HELP."""
    selected = copy.copy(trainer)
    selected.title = "Lightning's trainer (--help.trainer shows all of its settings)"
    actions = {action.dest: action for action in trainer._group_actions}
    selected._group_actions = [actions[name] for name in HELP if name in actions]
    return selected


class TrainerHelp(argparse._HelpAction):
    """The flag that shows all of the trainer's settings, in Lightning's words."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> NoReturn:
        assert isinstance(parser, Parser) and parser.groups is not None
        parser.formatter_class = DefaultHelpFormatter
        parser._action_groups = [parser.groups["trainer"]]
        parser.print_help()
        parser.exit()
