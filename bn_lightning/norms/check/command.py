"""The command `check`: examine a normalization layer and print the findings as a table."""

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


def main(arguments: list[str], experiment: str) -> None:
    """Run `check NORM` and print the findings.

    The exit code is 1 if a property fails or, with --identical, if an identity differs.

    Args:
        arguments: those of the command line, the command itself first.
        experiment: what each command is given. This one examines a norm without it.
    """
    # A warning about CUDA, which is not used here.
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
        prog=f"{terminal.program()} check", description="Examine a normalization layer."
    )
    names = ", ".join(registry.NORMS)
    parser.add_argument("norm", type=str, help=f"{names}, or an import path: package.module.Name")
    parser.add_argument(
        "--norm_args",
        type=dict[str, Any],
        default={},
        help="Further arguments of the norm: --norm_args.eps 1e-3",
    )
    parser.add_argument(
        "--identical",
        action="store_true",
        help="It is meant to be torch's BatchNorm, so fail if not.",
    )
    parser.add_argument("--json", action="store_true", help="Print the findings as JSON.")
    return parser


def examine(name: str, norm_args: dict[str, Any] | None = None) -> Iterator[Finding]:
    """Run all checks on the norm of that name or import path: about a minute in all.

    Yields:
        The findings, one at a time.

    Raises:
        UserError: an unknown norm, or arguments that it does not take.
    """
    make = partial(probes.make_layer, name, norm_args or {})
    # A mistake of the user ends the command here. It is not a finding about the layer.
    make(2), make(4)
    for check in all_checks():
        torch.manual_seed(0)
        yield check(make)


def all_checks() -> list[Check]:
    """Return all checks in the order of the table: module by module, in the order of the file."""
    # Imported here because --help should not pay for Lightning, which `processes` needs.
    from bn_lightning.norms.check import identity, measurements, processes, properties

    modules = (properties, processes, identity, measurements)
    values = [value for module in modules for value in vars(module).values()]
    return [value for value in values if isinstance(value, Check)]


def line(finding: Finding) -> str:
    """Return the finding as a line of the table, with its note below."""
    number = "" if finding.difference is None else f"{finding.difference:.2g}"
    note = "".join(f"\n      {part}" for part in textwrap.wrap(finding.note, 110))
    return f"  {finding.question:66}{finding.verdict:>9}{number:>10}{note}"
