"""Runs per minute of `compare --jobs 2` and `--jobs 1`, and the overhead of a run.

    python tests/benchmarks/jobs.py [--rounds 5] [--runs 6] [--epochs 3]

Both sides take turns. The cores are divided: on a machine with two, each of two workers has one
thread, and one worker has both. The time is counted from the first end of a run to the last, so
without the start of the workers, which happens once for each study. The overhead is the time of a
run without its training epochs: settings, folder, validation, checkpoints, the test.
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
    """Return runs per minute, and the median seconds of a run without its training."""
    with tempfile.TemporaryDirectory() as root:
        command = [
            sys.executable,
            "-m",
            "bn_lightning",
            "compare",
            "--norm",
            "custom",
            "--seeds",
            str(runs + jobs),
        ]
        command += [
            "--trainer.max_epochs",
            str(epochs),
            "--jobs",
            str(jobs),
            "--trainer.default_root_dir",
            root,
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        ends = [time.perf_counter() for line in process.stdout if line.startswith("[")]
        assert process.wait() == 0
        trained = [
            json.loads(path.read_text())["train_seconds"]
            for path in Path(root).rglob("result.json")
        ]
    seconds = ends[-1] - ends[jobs - 1]  # each worker has ended one run
    return 60 * runs / seconds, jobs * seconds / runs - statistics.median(trained)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    ratios, overheads = [], {1: [], 2: []}
    for number in range(args.rounds):
        one, two = (study(jobs, args.runs, args.epochs) for jobs in (1, 2))
        ratios.append(two[0] / one[0])
        overheads[1].append(one[1])
        overheads[2].append(two[1])
        print(f"round {number + 1}: {one[0]:.1f} and {two[0]:.1f} runs a minute", flush=True)
    low, high = min(ratios), max(ratios)
    median = statistics.median(ratios)
    print(f"--jobs 2 / --jobs 1: median {median:.2f}, from {low:.2f} to {high:.2f}")
    for jobs, seconds in overheads.items():
        low, high = min(seconds), max(seconds)
        median = statistics.median(seconds)
        print(f"overhead of a run, --jobs {jobs}: median {median:.2f} s, {low:.2f} to {high:.2f}")


if __name__ == "__main__":
    main()
