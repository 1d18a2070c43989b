"""Reproduce figure 1 (b, c) of Ioffe and Szegedy 2015 for LeNet: inputs of the activations.

    python tests/benchmarks/percentiles.py [--norms custom none] [--seeds 0 1 2] [--epochs 10]
        [--figure FILE.png]

The figure shows the 15th, 50th and 85th percentile of the inputs of a sigmoid in the last hidden
layer during training. With batch normalization they become stable early; without it they change
throughout. This command runs `fit --config configs/article.yaml` for each norm and seed, and reads
the percentiles that `NormMonitor` has logged.

It prints the drift of each activation: how far the percentiles move between the end of the first
epoch and the end of training, on average over the three. The unit is the final distance from the
15th to the 85th percentile. Each value is the mean over the seeds, with minimum and maximum.
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


def run(norm: str, seed: int, epochs: int, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Train, and return the monitored steps (S,) and the percentiles (activation, 3, S)."""
    name = f"{norm}-{seed}"
    command = [sys.executable, "-m", "bn_lightning", "fit", "--config", "configs/article.yaml"]
    command += ["--model.norm", norm, "--seed_everything", str(seed)]
    command += ["--trainer.max_epochs", str(epochs)]
    command += ["--trainer.default_root_dir", str(folder), "--name", name]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    events = EventAccumulator(str(folder / name / "0"), size_guidance={"scalars": 0}).Reload()
    curves = [
        [events.Scalars(f"activation_input/{a}/p{p}") for p in PERCENTILES] for a in ACTIVATIONS
    ]
    steps = np.array([event.step for event in curves[0][0]])
    values = [[[event.value for event in curve] for curve in row] for row in curves]
    return steps, np.array(values)


def drift(steps: np.ndarray, percentiles: np.ndarray, epochs: int) -> float:
    """Return the drift of one activation, whose percentiles have shape (3, S)."""
    after = percentiles[:, steps >= steps[-1] / epochs]
    return float(np.abs(after[:, -1] - after[:, 0]).mean() / (after[2, -1] - after[0, -1]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--norms", nargs="+", default=["custom", "none"], help="norms to train")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds to train")
    parser.add_argument("--epochs", type=int, default=10, help="epochs per run")
    parser.add_argument("--figure", help="write a plot of the first seed to this file")
    args = parser.parse_args()
    curves = {}
    with tempfile.TemporaryDirectory() as folder:
        for norm in args.norms:
            for seed in args.seeds:
                curves[norm, seed] = run(norm, seed, args.epochs, Path(folder))
                print(f"{norm}, seed {seed}: done", flush=True)
    for norm in args.norms:
        for a in ACTIVATIONS:
            drifts = [
                drift(steps, p[a - 1], args.epochs)
                for steps, p in (curves[norm, n] for n in args.seeds)
            ]
            spread = f"({min(drifts):.2f} to {max(drifts):.2f})"
            print(f"{norm:8} activation {a}  drift {np.mean(drifts):6.2f}  {spread}")
    if args.figure:
        draw({norm: curves[norm, args.seeds[0]] for norm in args.norms}, args.figure)


def draw(curves: dict[str, tuple[np.ndarray, np.ndarray]], path: str) -> None:
    """Plot the percentiles: one row per norm, one column per activation."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(curves), 4, figsize=(12, 2.6 * len(curves)), sharex=True, squeeze=False
    )
    for row, (norm, (steps, values)) in zip(axes, curves.items(), strict=True):
        for a, axis in zip(ACTIVATIONS, row, strict=True):
            low, middle, high = values[a - 1]
            axis.fill_between(steps, low, high, alpha=0.25)
            axis.plot(steps, middle)
            axis.set_title(f"{norm}: activation {a}", fontsize=9)
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.suptitle("Inputs of the activations: 15th, 50th and 85th percentile", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
