"""Measure the speed of two runs of `fit` on the same CPU cores, relative to one run alone.

    python tests/benchmarks/two_runs.py [--rounds 5] [--epochs 3]

Each round trains one run alone, then two runs at a time in each of three ways: with the
defaults, with `--threads 1`, and with threads that spin while they wait, which is the
default of OpenMP. One run that spins is measured too. The output shows the median of
the ratios within a round, with the minimum and maximum. For two runs, it is the ratio
of the slower one.
"""

import argparse
import os
import statistics
from concurrent.futures import ThreadPoolExecutor

from measured import images_per_second

# The spin count of GNU OpenMP if no environment variable sets it.
SPINNING = {"GOMP_SPINCOUNT": "300000"}

VARIANTS = {
    "one run": (1, (), {}),
    "one run, spinning": (1, (), SPINNING),
    "two runs": (2, (), {}),
    "two runs, --threads 1": (2, ("--threads", "1"), {}),
    "two runs, spinning": (2, (), SPINNING),
}


def slowest(runs: int, epochs: int, flags: tuple[str, ...], variables: dict[str, str]) -> float:
    """Run `fit` several times at once, and return the images per second of the slowest run."""
    environment = {n: v for n, v in os.environ.items() if n != "OMP_NUM_THREADS"} | variables
    settings = ("--trainer.accelerator", "cpu", "--trainer.max_epochs", str(epochs), *flags)
    with ThreadPoolExecutor(runs) as threads:
        waiting = [
            threads.submit(images_per_second, *settings, environment=environment)
            for _ in range(runs)
        ]
    return min(run.result() for run in waiting)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds (default: 5)")
    parser.add_argument("--epochs", type=int, default=3, help="epochs per run (default: 3)")
    args = parser.parse_args()

    speeds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(args.rounds):
        for variant, (runs, flags, variables) in VARIANTS.items():
            speed = slowest(runs, args.epochs, flags, variables)
            speeds[variant].append(speed)
            print(f"{variant:22} {speed:8,.0f} images/s", flush=True)

    baseline, *others = VARIANTS
    for variant in others:
        pairs = zip(speeds[variant], speeds[baseline], strict=True)
        ratios = [speed / alone for speed, alone in pairs]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{variant} / {baseline}: median {statistics.median(ratios):.2f} ({spread})")


if __name__ == "__main__":
    main()
