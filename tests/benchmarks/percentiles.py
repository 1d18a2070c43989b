"""Reproduce figure 1 (b, c) of Ioffe and Szegedy 2015 for LeNet: activation inputs.

    python tests/benchmarks/percentiles.py [--norms custom none] [--seeds 0 1 2]
        [--epochs 10] [--figure FILE.png]

The figure in the paper shows the 15th, 50th and 85th percentile of the inputs of a
sigmoid in the last hidden layer during training. With batch normalization they become
stable early. Without it they change throughout training.

This command runs `fit --config configs/article.yaml` for each norm and seed, and reads
the percentiles that `NormMonitor` logs. It prints the drift of each activation: the mean
change of the three percentiles between the end of the first epoch and the end of
training, divided by the final distance between the 15th and the 85th percentile. Each
value is the mean over the seeds, with the minimum and maximum.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ACTIVATIONS = (1, 2, 3, 4)
PERCENTILES = (15, 50, 85)


def train(norm: str, seed: int, epochs: int, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Train, and return the logged percentiles.

    Returns:
        The S monitored steps, of shape (S,), and the percentiles of the activation
        inputs, of shape (activations, percentiles, S).
    """
    name = f"{norm}-{seed}"
    command = [sys.executable, "-m", "bn_lightning", "fit", "--config", "configs/article.yaml"]
    command += ["--model.norm", norm, "--seed_everything", str(seed)]
    command += ["--trainer.max_epochs", str(epochs)]
    command += ["--trainer.default_root_dir", str(folder), "--name", name]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    # Size 0 loads all events of a tag.
    log = EventAccumulator(str(folder / name / "0"), size_guidance={"scalars": 0})
    log.Reload()
    curves = [
        [log.Scalars(f"activation_input/{activation}/p{percentile}") for percentile in PERCENTILES]
        for activation in ACTIVATIONS
    ]
    steps = np.array([event.step for event in curves[0][0]])
    values = [[[event.value for event in curve] for curve in row] for row in curves]
    return steps, np.array(values)


def drift(steps: np.ndarray, percentiles: np.ndarray, epochs: int) -> float:
    """Return the drift of one activation, whose percentiles have shape (3, S)."""
    after_first_epoch = percentiles[:, steps >= steps[-1] / epochs]
    first, last = after_first_epoch[:, 0], after_first_epoch[:, -1]
    width = last[2] - last[0]
    return float(np.abs(last - first).mean() / width)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--norms",
        nargs="+",
        default=["custom", "none"],
        help="norms to train (default: custom none)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        help="seeds to train each norm with (default: 0 1 2)",
    )
    parser.add_argument("--epochs", type=int, default=10, help="epochs per run (default: 10)")
    parser.add_argument("--figure", help="write a plot of the first seed to this file")
    args = parser.parse_args()

    curves = {}
    with tempfile.TemporaryDirectory() as folder:
        for norm in args.norms:
            for seed in args.seeds:
                curves[norm, seed] = train(norm, seed, args.epochs, Path(folder))
                print(f"{norm}, seed {seed}: finished", flush=True)

    for norm in args.norms:
        for activation in ACTIVATIONS:
            drifts = []
            for seed in args.seeds:
                steps, percentiles = curves[norm, seed]
                drifts.append(drift(steps, percentiles[activation - 1], args.epochs))
            spread = f"({min(drifts):.2f} to {max(drifts):.2f})"
            print(f"{norm:8} activation {activation}  drift {np.mean(drifts):6.2f}  {spread}")

    if args.figure:
        plot({norm: curves[norm, args.seeds[0]] for norm in args.norms}, args.figure)


def plot(curves: dict[str, tuple[np.ndarray, np.ndarray]], path: str) -> None:
    """Plot the percentiles: one row per norm, one column per activation."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(curves), 4, figsize=(12, 2.6 * len(curves)), sharex=True, squeeze=False
    )
    for row, (norm, (steps, values)) in zip(axes, curves.items(), strict=True):
        for activation, axis in zip(ACTIVATIONS, row, strict=True):
            low, median, high = values[activation - 1]
            axis.fill_between(steps, low, high, alpha=0.25)
            axis.plot(steps, median)
            axis.set_title(f"{norm}: activation {activation}", fontsize=9)
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    title = "Inputs of the activations: 15th, 50th and 85th percentile"
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
