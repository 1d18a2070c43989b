"""Seconds from start to end of `fit --help`, beside the bare import of LightningCLI, and of --help and --version.

    python tests/benchmarks/startup.py [--rounds 7]

The sides take turns; prints medians, and the ratio of the first two in each round.
"""

import argparse
import statistics
import subprocess
import sys
import time

SIDES = {
    "fit --help": ["-m", "bn_lightning", "fit", "--help"],
    "import LightningCLI": ["-c", "from lightning.pytorch.cli import LightningCLI"],
    "--help": ["-m", "bn_lightning", "--help"],
    "--version": ["-m", "bn_lightning", "--version"],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(rounds + 1):
        for side, arguments in SIDES.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            if number:  # the first round fills the file cache
                seconds[side].append(time.perf_counter() - start)
    for side, values in seconds.items():
        print(
            f"{side:20} median {statistics.median(values):.3f} s, from {min(values):.3f} to {max(values):.3f}"
        )
    ratios = [
        a / b for a, b in zip(seconds["fit --help"], seconds["import LightningCLI"], strict=True)
    ]
    low, high = min(ratios), max(ratios)
    print(
        f"fit --help / import LightningCLI: median {statistics.median(ratios):.3f}, from {low:.3f} to {high:.3f}"
    )


if __name__ == "__main__":
    main()
