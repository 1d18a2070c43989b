"""Measure the startup time of commands, and of importing LightningCLI.

    python tests/benchmarks/startup.py [--rounds 7]

The commands are `fit --help`, `--help` and `--version`. Each round runs all of them. The
output shows the median seconds over the rounds, with the minimum and maximum, and the
ratio of `fit --help` to the import.
"""

import argparse
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "fit --help": ["-m", "bn_lightning", "fit", "--help"],
    "import LightningCLI": ["-c", "from lightning.pytorch.cli import LightningCLI"],
    "--help": ["-m", "bn_lightning", "--help"],
    "--version": ["-m", "bn_lightning", "--version"],
}


def format_values(values: list[float], unit: str = "") -> str:
    median, low, high = statistics.median(values), min(values), max(values)
    return f"median {median:.3f}{unit} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="number of rounds (default: 7)")
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {command: [] for command in COMMANDS}
    for number in range(rounds + 1):
        for command, arguments in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            # The first round is a warm-up that fills the file cache. It is not recorded.
            if number > 0:
                seconds[command].append(time.perf_counter() - start)
    for command, values in seconds.items():
        print(f"{command:20} {format_values(values, ' s')}")
    pairs = zip(seconds["fit --help"], seconds["import LightningCLI"], strict=True)
    ratios = [command / baseline for command, baseline in pairs]
    print(f"fit --help / import LightningCLI: {format_values(ratios)}")


if __name__ == "__main__":
    main()
