"""Measure runs per minute of `compare --jobs 2` and `--jobs 1`, and the overhead of a run.

    python tests/benchmarks/jobs.py [--rounds 5] [--runs 6] [--epochs 3]

Both commands take turns. CPU cores are divided among the workers: with two cores, each of two
workers has one thread, and a single worker has two. Time is measured from the end of the first run
to the end of the last one. It excludes the start of the workers, which happens once per study. The
overhead is the time of a run minus its training epochs: settings, folder, validation, checkpoints
and test.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def study(jobs: int, runs: int, epochs: int) -> tuple[float, float]:
    """Return runs per minute, and the seconds of a run without its training."""
    with tempfile.TemporaryDirectory() as root:
        command = [sys.executable, "-m", "bn_lightning", "compare", "--norm", "custom"]
        command += ["--seeds", str(runs + jobs), "--jobs", str(jobs)]
        command += ["--trainer.max_epochs", str(epochs), "--trainer.default_root_dir", root]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        ends = [time.perf_counter() for line in process.stdout if line.startswith("[")]
        assert process.wait() == 0
        trained = [
            json.loads(path.read_text())["train_seconds"]
            for path in Path(root).rglob("result.json")
        ]
    # The clock starts when each worker has finished its first run.
    seconds = ends[-1] - ends[jobs - 1]
    return 60 * runs / seconds, jobs * seconds / runs - statistics.median(trained)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds")
    parser.add_argument("--runs", type=int, default=6, help="measured runs per command")
    parser.add_argument("--epochs", type=int, default=3, help="epochs per run")
    args = parser.parse_args()
    ratios, overheads = [], {1: [], 2: []}
    for number in range(args.rounds):
        one, two = (study(jobs, args.runs, args.epochs) for jobs in (1, 2))
        ratios.append(two[0] / one[0])
        overheads[1].append(one[1])
        overheads[2].append(two[1])
        speeds = f"{one[0]:.1f} (--jobs 1), {two[0]:.1f} (--jobs 2)"
        print(f"round {number + 1}: runs per minute: {speeds}", flush=True)
    low, high = min(ratios), max(ratios)
    median = statistics.median(ratios)
    print(f"--jobs 2 / --jobs 1: median {median:.2f} ({low:.2f} to {high:.2f})")
    for jobs, seconds in overheads.items():
        low, high = min(seconds), max(seconds)
        median = statistics.median(seconds)
        print(f"overhead of a run, --jobs {jobs}: median {median:.2f} s ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
