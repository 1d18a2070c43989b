"""Measure the seconds of `fit --help`, `--help`, `--version`, and of importing LightningCLI.

    python tests/benchmarks/startup.py [--rounds 7]

The commands take turns. Printed are the median, minimum and maximum over the rounds, and the ratio
of `fit --help` to the import.
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


def spread(values: list[float], unit: str = "") -> str:
    median, low, high = statistics.median(values), min(values), max(values)
    return f"median {median:.3f}{unit} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="number of rounds")
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {command: [] for command in COMMANDS}
    for number in range(rounds + 1):
        for command, arguments in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            # The first round fills the file cache and does not count.
            if number:
                seconds[command].append(time.perf_counter() - start)
    for command, values in seconds.items():
        print(f"{command:20} {spread(values, ' s')}")
    pairs = zip(seconds["fit --help"], seconds["import LightningCLI"], strict=True)
    print(f"fit --help / import LightningCLI: {spread([a / b for a, b in pairs])}")


if __name__ == "__main__":
    main()
