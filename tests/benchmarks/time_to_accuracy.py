"""Compare the time to the article's accuracy: a config of this project and the article's loop.

    python tests/benchmarks/time_to_accuracy.py [--rounds 5] [--config configs/speedrun.yaml]

Both programs take turns, each in a new process, with 60,000 images. The article's loop, from its
book, trains for ten epochs: torchvision's DataLoader with ToTensor and four workers, PyTorch's norm
layer, a test after each epoch. Printed are the seconds of training, the total seconds from the
start of the process to the tested model, the test accuracy, and the ratios within each round.
"""

import argparse
import statistics
import subprocess
import sys
import time

from measured import result
from throughput import article


def config(file: str, seed: int) -> dict[str, float]:
    """Train with a config, and return the seconds and the test accuracy."""
    start = time.perf_counter()
    done = result("--config", file, "--seed_everything", str(seed))
    total = time.perf_counter() - start
    return {"training": done["train_seconds"], "total": total, "test acc": done["test_acc"]}


def loop() -> dict[str, float]:
    """Train with the article's loop, and return the seconds and the test accuracy."""
    start = time.perf_counter()
    command = [sys.executable, __file__, "--loop"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    total = time.perf_counter() - start
    seconds, accuracy = map(float, done.stdout.split())
    return {"training": seconds, "total": total, "test acc": accuracy}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds")
    parser.add_argument("--config", default="configs/speedrun.yaml", help="config to measure")
    parser.add_argument(
        "--loop", action="store_true", help="run only the article's loop, once, in this process"
    )
    args = parser.parse_args()
    if args.loop:
        print(*article(10))
        return
    rounds = []
    for number in range(args.rounds):
        rounds.append((loop(), config(args.config, number)))
        for program, metrics in zip(("article", args.config), rounds[-1], strict=True):
            text = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            print(f"round {number + 1}  {program:22} {text}", flush=True)
    for name in ("training", "total"):
        ratios = [a[name] / b[name] for a, b in rounds]
        spread = f"({min(ratios):.1f} to {max(ratios):.1f})"
        median = statistics.median(ratios)
        print(f"{name}: the config is {median:.1f} times as fast {spread}")


if __name__ == "__main__":
    main()
