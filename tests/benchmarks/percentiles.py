"""Figure 1 (b, c) of the batch normalization paper, for LeNet: do the inputs of the activations settle?

    python tests/benchmarks/percentiles.py [--norms custom none] [--seeds 0 1 2] [--epochs 10] [--figure FILE.png]

Ioffe and Szegedy 2015 show the 15th, 50th and 85th percentile of the inputs of a sigmoid in the last hidden layer over
the training: with batch normalization they settle early, without it they wander. Here `fit --config
configs/article.yaml` is run for each norm and seed, and what `NormMonitor` has logged is read back. Printed for each
activation: its drift, how far the percentiles move from the first look after the first epoch to the last one; the mean
over the three, in units of the distance from the 15th to the 85th at the end. Means over the seeds, lowest to highest.
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
    """Steps (S,) and percentiles (4, 3, S), by activation."""
    command = [
        sys.executable,
        "-m",
        "bn_lightning",
        "fit",
        "--config",
        "configs/article.yaml",
        "--model.norm",
        norm,
    ]
    command += ["--seed_everything", str(seed), "--trainer.max_epochs", str(epochs)]
    command += ["--trainer.default_root_dir", str(folder), "--name", f"{norm}-{seed}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    events = EventAccumulator(
        str(folder / f"{norm}-{seed}" / "0"), size_guidance={"scalars": 0}
    ).Reload()
    curves = {
        (a, p): events.Scalars(f"activation_input/{a}/p{p}")
        for a in ACTIVATIONS
        for p in PERCENTILES
    }
    steps = np.array([event.step for event in curves[1, 50]])
    values = [[[event.value for event in curves[a, p]] for p in PERCENTILES] for a in ACTIVATIONS]
    return steps, np.array(values)


def drift(steps: np.ndarray, percentiles: np.ndarray, epochs: int) -> float:
    """Of one activation, percentiles (3, S)."""
    after = percentiles[:, steps >= steps[-1] / epochs]
    return float(np.abs(after[:, -1] - after[:, 0]).mean() / (after[2, -1] - after[0, -1]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--norms", nargs="+", default=["custom", "none"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument(
        "--figure", help="draw the curves of the first seed here (needs matplotlib)"
    )
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
            print(
                f"{norm:8} activation {a}  drift {np.mean(drifts):6.2f}  ({min(drifts):.2f} to {max(drifts):.2f})"
            )
    if args.figure:
        draw({norm: curves[norm, args.seeds[0]] for norm in args.norms}, args.figure)


def draw(curves: dict[str, tuple[np.ndarray, np.ndarray]], path: str) -> None:
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
