"""Measure runs per minute of `compare` with --jobs 1 and 2, and the overhead of a run.

    python tests/benchmarks/jobs.py [--rounds 5] [--runs 6] [--epochs 3]

Each round runs both commands. CPU cores are divided among the workers: on two cores,
--jobs 1 trains with two threads, and --jobs 2 trains two runs with one thread each.

The time is measured from the end of each worker's first run to the end of the last run.
It excludes the start of the workers, which happens once per study.

The overhead is the time of a run minus its training epochs. It consists of reading the
settings, creating the folder, validation, checkpoints and the test.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def measure(jobs: int, runs: int, epochs: int) -> tuple[float, float]:
    """Run a study, and return the runs per minute and the overhead of a run in seconds."""
    with tempfile.TemporaryDirectory() as root:
        command = [sys.executable, "-m", "bn_lightning", "compare", "--norm", "custom"]
        command += ["--seeds", str(runs + jobs), "--jobs", str(jobs)]
        command += ["--trainer.max_epochs", str(epochs)]
        command += ["--trainer.default_root_dir", root]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        # `compare` prints a line that starts with "[" after each run.
        ends = [time.perf_counter() for line in process.stdout if line.startswith("[")]
        assert process.wait() == 0
        train_seconds = [
            json.loads(path.read_text())["train_seconds"]
            for path in Path(root).rglob("result.json")
        ]
    # The first `jobs` runs include the start of the workers and are not measured.
    seconds = ends[-1] - ends[jobs - 1]
    seconds_per_run = jobs * seconds / runs
    return 60 * runs / seconds, seconds_per_run - statistics.median(train_seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds (default: 5)")
    parser.add_argument(
        "--runs", type=int, default=6, help="measured runs per command (default: 6)"
    )
    parser.add_argument("--epochs", type=int, default=3, help="epochs per run (default: 3)")
    args = parser.parse_args()

    ratios: list[float] = []
    overheads: dict[int, list[float]] = {1: [], 2: []}
    for number in range(args.rounds):
        speeds = {}
        for jobs in overheads:
            speeds[jobs], overhead = measure(jobs, args.runs, args.epochs)
            overheads[jobs].append(overhead)
        ratios.append(speeds[2] / speeds[1])
        text = f"{speeds[1]:.1f} (--jobs 1), {speeds[2]:.1f} (--jobs 2)"
        print(f"round {number + 1}: runs per minute: {text}", flush=True)

    low, high = min(ratios), max(ratios)
    median = statistics.median(ratios)
    print(f"--jobs 2 / --jobs 1: median {median:.2f} ({low:.2f} to {high:.2f})")
    for jobs, seconds in overheads.items():
        low, high = min(seconds), max(seconds)
        median = statistics.median(seconds)
        text = f"median {median:.2f} s ({low:.2f} to {high:.2f})"
        print(f"overhead of a run, --jobs {jobs}: {text}")


if __name__ == "__main__":
    main()
