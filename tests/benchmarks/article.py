"""The article's recipe with each norm and several seeds: a table and a figure of learning curves.

    python tests/benchmarks/article.py [--norms custom builtin article none] [--seeds 0 1 2] [--figure curves.png]

Each run is `fit --config configs/article.yaml` in a process of its own; runs go below --runs, and one that is there
already is not repeated, or gone on with. What is called test accuracy here is that of one epoch, after that epoch.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

NORMS = ("custom", "builtin", "article", "none")


def run(folder: Path, norm: str, seed: int) -> None:
    result = folder / "result.json"
    if result.exists() and json.loads(result.read_text())["finished"]:
        return
    name = folder.parent
    command = [sys.executable, "-m", "bn_lightning", "fit", "--config", "configs/article.yaml"]
    command += ["--model.norm", norm, "--seed_everything", str(seed), "--trainer.log_every_n_steps", "1"]
    command += ["--trainer.default_root_dir", str(name.parent), "--name", name.name, "--ckpt_path", "last"]
    print("$", *command, flush=True)
    subprocess.run(command, check=True)


def curve(folder: Path, tag: str) -> list[float]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [event.value for event in events.Scalars(tag)]


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def draw(curves: dict[str, list[list[float]]], losses: dict[str, list[list[float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, title, of in ((axes[0], "train loss", losses), (axes[1], "test accuracy", curves)):
        for norm, runs in of.items():
            epochs = range(1, len(runs[0]) + 1)
            at_epoch = list(zip(*runs, strict=True))
            (line,) = axis.plot(epochs, [statistics.mean(values) for values in at_epoch], marker="o", label=norm)
            low, high = [min(values) for values in at_epoch], [max(values) for values in at_epoch]
            axis.fill_between(epochs, low, high, alpha=0.15, color=line.get_color())
        axis.set(xlabel="epoch", title=title)
        axis.grid(alpha=0.3)
        axis.legend()
    num_seeds = len(next(iter(curves.values())))
    figure.suptitle(f"The article's recipe, {num_seeds} seeds: mean, and the range from the lowest to the highest")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norms", nargs="+", default=NORMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()

    accuracies: dict[str, list[list[float]]] = {}
    losses: dict[str, list[list[float]]] = {}
    rows, first_losses = [], {}
    for norm in args.norms:
        results = []
        for seed in args.seeds:
            folder = args.runs / f"article-{norm}-seed{seed}" / "0"
            run(folder, norm, seed)
            results.append(json.loads((folder / "result.json").read_text()))
            first_losses[norm, seed] = curve(folder, "train_loss")[0]
            accuracies.setdefault(norm, []).append(curve(folder, "val_acc"))
            losses.setdefault(norm, []).append(curve(folder, "train_loss_epoch"))
            figures = {name: round(results[-1][name], 4) for name in ("train_loss", "train_acc", "val_acc_final")}
            print(norm, seed, figures, "test accuracy by epoch", [round(a, 3) for a in accuracies[norm][-1]])
        names = ("train_loss", "train_acc", "val_acc_final", "val_acc_best", "val_acc_mean_of_last_3")
        rows.append(
            f"| `{norm}` | " + " | ".join(spread([result[name] for result in results]) for name in names) + " |"
        )
    print(f"\nseeds {args.seeds}: mean (lowest to highest)\n")
    print("| norm | train loss | train acc | test acc, final | test acc, best epoch | test acc, mean of last 3 |")
    print("|---|---|---|---|---|---|")
    print("\n".join(rows))
    for seed in args.seeds:
        print(f"first step's loss, seed {seed}:", {norm: first_losses[norm, seed] for norm in args.norms})
    if args.figure:
        draw(accuracies, losses, args.figure)


if __name__ == "__main__":
    main()
