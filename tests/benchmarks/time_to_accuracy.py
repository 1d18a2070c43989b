"""Compare the training time of a config with that of the article's loop.

    python tests/benchmarks/time_to_accuracy.py [--rounds 5]
        [--config configs/speedrun.yaml]

Each round runs both programs, each in a new process, on 60,000 images. The article's
loop trains for ten epochs with torchvision's data set, ToTensor, a DataLoader with four
workers, PyTorch's norm layer and a test after each epoch.

The output shows the seconds of training, the total seconds from the start of the process
to the end of the test, the test accuracy, and the ratios within each round.
"""

import argparse
import statistics
import subprocess
import sys
import time

from measured import fit_result
from throughput import run_article_loop


def measure_config(file: str, seed: int) -> dict[str, float]:
    """Run `fit` with a config, and return its seconds and test accuracy."""
    start = time.perf_counter()
    result = fit_result("--config", file, "--seed_everything", str(seed))
    total = time.perf_counter() - start
    return {
        "training": result["train_seconds"],
        "total": total,
        "test acc": result["test_acc"],
    }


def measure_article_loop() -> dict[str, float]:
    """Run the article's loop in a new process, and return its seconds and test accuracy."""
    start = time.perf_counter()
    command = [sys.executable, __file__, "--loop"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    total = time.perf_counter() - start
    seconds, accuracy = map(float, process.stdout.split())
    return {"training": seconds, "total": total, "test acc": accuracy}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds (default: 5)")
    parser.add_argument(
        "--config",
        default="configs/speedrun.yaml",
        help="config to measure (default: configs/speedrun.yaml)",
    )
    parser.add_argument(
        "--loop",
        action="store_true",
        help="run only the article's loop, once, in this process",
    )
    args = parser.parse_args()
    if args.loop:
        print(*run_article_loop(epochs=10))
        return

    rounds = []
    for number in range(args.rounds):
        rounds.append((measure_article_loop(), measure_config(args.config, number)))
        for program, metrics in zip(("article", args.config), rounds[-1], strict=True):
            text = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            print(f"round {number + 1}  {program:22} {text}", flush=True)

    for name in ("training", "total"):
        ratios = [article[name] / config[name] for article, config in rounds]
        spread = f"({min(ratios):.1f} to {max(ratios):.1f})"
        median = statistics.median(ratios)
        print(f"{name} time, article / config: median {median:.1f} {spread}")


if __name__ == "__main__":
    main()
