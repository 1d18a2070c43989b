"""Time to the article's accuracy: a config of this project beside the article's own loop of ten epochs.

    python tests/benchmarks/time_to_accuracy.py [--rounds 5] [--config configs/speedrun.yaml]

Both sides take turns, each in a process of its own, with all 60,000 images. The article's is a loop as its book writes
it: torchvision's DataLoader with ToTensor and four workers, torch's own norm, a test after each epoch. Prints seconds
of training, seconds from the start of the process to the tested model, accuracies, and the ratios of each round.
"""

import argparse
import statistics
import subprocess
import sys
import time

from measured import result
from throughput import article


def config(file: str, seed: int) -> dict[str, float]:
    start = time.perf_counter()
    done = result("--config", file, "--seed_everything", str(seed))
    whole = time.perf_counter() - start
    return {"training": done["train_seconds"], "whole": whole, "test acc": done["test_acc"]}


def loop() -> dict[str, float]:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, "--loop"], capture_output=True, text=True, check=True
    )
    whole = time.perf_counter() - start
    seconds, accuracy = map(float, done.stdout.split())
    return {"training": seconds, "whole": whole, "test acc": accuracy}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--config", default="configs/speedrun.yaml")
    parser.add_argument(
        "--loop", action="store_true", help="the article's loop once, in this process"
    )
    args = parser.parse_args()
    if args.loop:
        print(*article(10))
        return
    rounds = []
    for number in range(args.rounds):
        rounds.append((loop(), config(args.config, number)))
        for side, figures in zip(("article", args.config), rounds[-1], strict=True):
            print(
                f"round {number + 1}  {side:22}",
                "  ".join(f"{n} {v:.3f}" for n, v in figures.items()),
                flush=True,
            )
    for name in ("training", "whole"):
        ratios = [a[name] / b[name] for a, b in rounds]
        print(
            f"{name}: {statistics.median(ratios):.1f} times less, from {min(ratios):.1f} to {max(ratios):.1f}"
        )


if __name__ == "__main__":
    main()
