"""Run `check` on mutants of correct normalization layers, and print those that it does not catch.

    python tests/benchmarks/mutants.py [--base NAME ...] [--only TEXT] [--sample N] [--seed 0]

A mutant is caught if a property fails, if it differs from PyTorch's layer (the two batch norms
only), if it cannot be examined, or if the check does not end within 120 seconds. Each base is
checked first: if a base itself fails, its mutants are left out.

Each check runs in a process of its own, two at a time. All mutants take hours.
"""

import argparse
import random
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support.equivalent_mutants import EQUIVALENT
from tests.support.mutant_examination import Outcome, examine_all
from tests.support.mutants import Mutant, mutants
from tests.support.plain_norms import BASES


def examine_with_progress(layers: list[tuple[str, str, type]]) -> dict[str, Outcome]:
    """Check layers, given by name, base and class, and return the outcome of each name."""
    # The monitor of tqdm is a thread, and a process with threads cannot be forked safely.
    tqdm.monitor_interval = 0
    return dict(tqdm(examine_all(layers), total=len(layers), unit="layer"))


def correct_bases(names: list[str]) -> list[str]:
    """Return the bases that pass the check, and print why the others do not."""
    outcomes = examine_with_progress([(name, name, BASES[name]) for name in names])
    for name, outcome in outcomes.items():
        if outcome.note:
            print(f"The correct layer {name} does not pass. Its mutants are left out.")
            print(f"    {outcome.note}")
    return [name for name in names if not outcomes[name].note]


def print_survivors(chosen: list[Mutant], outcomes: dict[str, Outcome]) -> None:
    for mutant in chosen:
        outcome = outcomes[mutant.name]
        if not outcome.caught:
            print(f"\nnot caught: {mutant.name}")
            print("\n".join(filter(None, (outcome.note, mutant.diff))))


def print_summary(chosen: list[Mutant], outcomes: dict[str, Outcome], equivalent: dict) -> None:
    print("\nHow mutants were caught")
    notes = Counter(outcome.note for outcome in outcomes.values() if outcome.caught)
    for note, number in notes.most_common():
        print(f"  {number:5}  {note}")

    print("\nEquivalent mutants, which were not examined")
    for name, reason in equivalent.items():
        print(f"  {name}\n      {reason}")

    print(f"\n{'base':18} {'equivalent':>10} {'examined':>10} {'caught':>10} {'share':>8}")
    for base in [*dict.fromkeys(mutant.base for mutant in chosen), "total"]:
        names = [m.name for m in chosen if base in (m.base, "total")]
        same = sum(base in (name.partition(".")[0], "total") for name in equivalent)
        caught = sum(outcomes[name].caught for name in names)
        share = f"{caught / len(names):8.1%}" if names else ""
        print(f"{base:18} {same:10} {len(names):10} {caught:10} {share}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--base", nargs="+", choices=BASES, default=list(BASES), help="default: all"
    )
    parser.add_argument("--only", default="", help="only mutants whose name contains this text")
    parser.add_argument("--sample", type=int, help="number of mutants (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (default: 0)")
    args = parser.parse_args()

    bases = correct_bases(args.base)
    selected = [m for m in mutants() if m.base in bases and args.only in m.name]
    if args.sample is not None:
        selected = random.Random(args.seed).sample(selected, min(args.sample, len(selected)))
    equivalent = {m.name: EQUIVALENT[m.name] for m in selected if m.name in EQUIVALENT}
    chosen = [m for m in selected if m.name not in EQUIVALENT]

    outcomes = examine_with_progress([(m.name, m.base, m.norm()) for m in chosen])
    print_survivors(chosen, outcomes)
    print_summary(chosen, outcomes, equivalent)


if __name__ == "__main__":
    main()
