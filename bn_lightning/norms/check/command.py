"""The command `check`: examine a normalization layer and print the findings as a table."""

import json
import logging
import math
import sys
import textwrap
from collections import Counter
from typing import Any

import torch
from jsonargparse import ArgumentParser

from bn_lightning import __version__, terminal
from bn_lightning.errors import UserError
from bn_lightning.norms import registry
from bn_lightning.norms.check import examination, reproduction
from bn_lightning.norms.check.findings import BAD, SECTIONS, Finding
from bn_lightning.norms.check.subject import Norm

# The notes end where the table ends.
WIDTH = 96


def main(arguments: list[str], experiment: str) -> None:
    """Run `check NORM`.

    The exit code is 1 if a property fails or, with --identical, if the norm differs from
    PyTorch's batch normalization.

    Args:
        arguments: the command line, starting with the command itself.
        experiment: not used. Every command receives it.
    """
    # This logger warns about CUDA, which is not used here.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    args = _parser().parse_args(arguments[1:])
    if args.list:
        for found in examination.properties():
            print(f"{found.name:32}{found.question}")
        return
    if args.norm is None:
        raise UserError(
            "The norm to check is missing. Use a name or an import path, for example "
            "`check custom`, or `check --list` for the names of the properties."
        )
    # A wrong name is reported before the examination starts.
    examination.choose([args.reproduce] if args.reproduce else args.property)
    norm = examination.prepare(
        registry.find(args.norm), args.norm, num_dims=args.num_dims, norm_args=args.norm_args
    )
    if args.reproduce is not None:
        sys.exit(_reproduce(norm, args.reproduce))
    chosen = examination.Examination(norm, args.identical, args.property)
    findings = _print_findings(chosen, args.json)
    passed = chosen.passed(findings)
    if args.json:
        print(json.dumps(_report(args.norm, norm, passed, findings), indent=2))
    else:
        counts = Counter(f.verdict for f in findings if f.section != "measured")
        totals = ", ".join(f"{number} {verdict}" for verdict, number in counts.items())
        print(f"\n{args.norm}: {totals}")
        if failed := [f.name for f in findings if f.verdict in BAD]:
            print(
                f"To see a failure in a few lines of code: {terminal.program()} check {args.norm} "
                f"--reproduce {failed[0]}"
            )
    sys.exit(0 if passed else 1)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=f"{terminal.program()} check",
        description="Examine a normalization layer: find what it normalizes, then check about 50 "
        "properties (see --list) at random points. Exit codes: 0 if all hold, 1 if one fails, 2 "
        "for wrong usage.",
    )
    names = ", ".join(registry.NORMS)
    parser.add_argument(
        "norm",
        type=str,
        nargs="?",
        help=f"Name ({names}) or import path (package.module.Name) of the norm.",
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
        help="For batch normalization: also fail if the results differ from those of "
        "torch.nn.BatchNorm1d, 2d or 3d.",
    )
    parser.add_argument(
        "--num_dims",
        type=int,
        nargs="+",
        help="Numbers of dimensions of the input, such as 2 after a linear layer or 4 for images. "
        "The norm must accept each. Default: those from 2 to 5 that it accepts.",
    )
    parser.add_argument(
        "--property", type=str, nargs="+", help="Examine these properties only; see --list."
    )
    parser.add_argument(
        "--list", action="store_true", help="Print each property and what it requires."
    )
    parser.add_argument("--json", action="store_true", help="Print the findings as JSON.")
    parser.add_argument(
        "--reproduce",
        type=str,
        metavar="PROPERTY",
        help="Print a short script that raises an error if this property fails.",
    )
    return parser


def _print_findings(chosen: examination.Examination, as_json: bool) -> list[Finding]:
    """Examine the norm. Print each finding when it is known, unless the report is JSON."""
    if not as_json:
        for text in _kinds(chosen.norm):
            print("\n".join(textwrap.wrap(text, WIDTH, subsequent_indent=" " * 15)))
    findings: list[Finding] = []
    for finding in chosen.run():
        if not as_json:
            if not findings or findings[-1].section != finding.section:
                print(f"\n{SECTIONS[finding.section]}")
            print(line(finding), flush=True)
        findings.append(finding)
    return findings


def _kinds(norm: Norm) -> list[str]:
    """Return one line for each number of dimensions: the kind, or the error."""
    lines = {d: str(kind) for d, kind in norm.kinds.items()}
    for num_dims, error in norm.rejected.items():
        first_line = str(error).partition("\n")[0]
        lines[num_dims] = f"not accepted ({type(error).__name__}: {first_line})"
    return [f"{d} dimensions: {text}" for d, text in sorted(lines.items())]


def line(finding: Finding) -> str:
    """Return a finding as a line of the table, followed by its note and its input."""
    is_number = finding.difference is not None and finding.difference != math.inf
    number = f"{finding.difference:.2g}" if is_number else ""
    notes = finding.note.splitlines()
    if finding.case is not None:
        notes.append(f"Seen with: {finding.case}.")
    parts = [part for note in notes for part in textwrap.wrap(note, WIDTH - 6)]
    note = "".join(f"\n      {part}" for part in parts)
    return f"  {finding.name:32}{finding.verdict:>9}{number:>10}".rstrip() + note


def _report(name: str, norm: Norm, passed: bool, findings: list[Finding]) -> dict[str, Any]:
    return {
        "norm": name,
        "passed": passed,
        "torch": torch.__version__,
        "bn_lightning": __version__,
        "kinds": {d: str(kind) for d, kind in norm.kinds.items()},
        "rejected": {d: f"{type(e).__name__}: {e}" for d, e in norm.rejected.items()},
        "findings": [
            {
                "section": f.section,
                "name": f.name,
                "verdict": f.verdict,
                # JSON has no infinity and no NaN.
                "difference": f.difference if math.isfinite(f.difference or 0) else None,
                "note": f.note,
                "input": None if f.case is None else str(f.case),
            }
            for f in findings
        ],
    }


def _reproduce(norm: Norm, name: str) -> int:
    """Print a script that shows a failure, and return the exit code."""
    (found,) = examination.choose([name])
    finding = found.examine(norm)
    if finding.verdict not in BAD:
        print(f"{name}: {finding.verdict}. There is no failure to reproduce. {finding.note}")
        return 0
    print(reproduction.script(found, finding, norm.build))
    return 1
