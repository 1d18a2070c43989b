"""The command `check`: check a normalization layer and print the findings as a table."""

import json
import logging
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from jsonargparse import ArgumentParser

from bn_lightning import __version__, terminal
from bn_lightning.norms import registry
from bn_lightning.norms.check import probes
from bn_lightning.norms.check.findings import SECTIONS, Check, Finding

# The notes end where the table ends.
NOTE_WIDTH = 81


def main(arguments: list[str], experiment: str) -> None:
    """Run `check NORM` and print the findings.

    The exit code is 1 if a property fails or, with --identical, if an identity check
    differs.

    Args:
        arguments: the command line, starting with the command itself.
        experiment: not used. Every command receives it.
    """
    # This logger warns about CUDA, which is not used here.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    args = _parser().parse_args(arguments[1:])
    findings: list[Finding] = []
    for finding in examine(args.norm, args.norm_args):
        if not args.json:
            if not findings or findings[-1].section != finding.section:
                print(f"\n{SECTIONS[finding.section]}")
            print(line(finding), flush=True)
        findings.append(finding)
    bad_verdicts = ("FAIL", "DIFFERS") if args.identical else ("FAIL",)
    passed = not any(finding.verdict in bad_verdicts for finding in findings)
    if args.json:
        versions = {"torch": torch.__version__, "bn_lightning": __version__}
        report = {"norm": args.norm, "passed": passed, **versions}
        print(json.dumps(report | {"findings": list(map(asdict, findings))}, indent=2))
    else:
        counts = Counter(f.verdict for f in findings if f.section != "measured")
        totals = ", ".join(f"{number} {verdict}" for verdict, number in counts.items())
        print(f"\n{args.norm}: {totals}")
    sys.exit(0 if passed else 1)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=f"{terminal.program()} check",
        description="Check a normalization layer: properties that every norm should have, "
        "identity with torch.nn.BatchNorm, time and memory.",
    )
    names = ", ".join(registry.NORMS)
    parser.add_argument(
        "norm", type=str, help=f"Name ({names}) or import path (package.module.Name) of the norm."
    )
    parser.add_argument(
        "--norm_args",
        type=dict[str, Any],
        default={},
        help="Arguments of the norm, for example --norm_args.eps 1e-3.",
    )
    parser.add_argument(
        "--identical",
        action="store_true",
        help="Also fail if the norm differs from torch.nn.BatchNorm.",
    )
    parser.add_argument("--json", action="store_true", help="Print the findings as JSON.")
    return parser


def examine(name: str, norm_args: dict[str, Any] | None = None) -> Iterator[Finding]:
    """Run all checks on a norm, which takes about a minute, and yield each finding.

    Args:
        name: the name or import path of the norm.
        norm_args: further arguments of the norm.

    Raises:
        UserError: the norm is unknown, or does not accept the arguments.
    """
    make = partial(probes.make_layer, name, norm_args or {})
    # A wrong name or argument raises here. Inside a check, it would become a finding.
    make(2), make(4)
    for check in all_checks():
        torch.manual_seed(0)
        yield check(make)


def all_checks() -> list[Check]:
    """Return all checks in the order of the table, which is their order in the modules."""
    # `processes` imports Lightning, which would slow down --help.
    from bn_lightning.norms.check import identity, measurements, processes, properties

    modules = (properties, processes, identity, measurements)
    values = [value for module in modules for value in vars(module).values()]
    return [value for value in values if isinstance(value, Check)]


def line(finding: Finding) -> str:
    """Return a finding as a line of the table, followed by its note."""
    number = "" if finding.difference is None else f"{finding.difference:.2g}"
    note = "".join(f"\n      {part}" for part in textwrap.wrap(finding.note, NOTE_WIDTH))
    return f"  {finding.question:66}{finding.verdict:>9}{number:>10}{note}"
