"""What looking on costs: `fit` with and without `--monitor`, on the 60,000 images.

    python tests/benchmarks/monitors.py [--rounds 5] [--epochs 4] [--norm custom]

First the share of the time of the epochs that `NormMonitor` takes, by a clock around its hooks, in one process. Then
images per second with it and without, sides in turn, each in a process of its own; the ratio of each round: median,
lowest, highest. And the seconds that the pictures at the end take, which are no part of the epochs.
"""

import argparse
import statistics
import tempfile
import time
from contextlib import ExitStack
from unittest import mock

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from measured import images_per_second, timed

from bn_lightning import Classifier, ClosingPictures, FashionMNIST, NormMonitor
from bn_lightning.monitoring.measurements import Measurements


def shares(norm: str, epochs: int) -> tuple[float, float]:
    """Of the time of the fit, what the monitor takes; and the seconds of the closing pictures."""
    spent = {"monitor": 0.0, "pictures": 0.0}

    monitor, pictures = NormMonitor(), ClosingPictures()
    hooks = (
        "on_train_batch_start",
        "on_before_backward",
        "on_before_optimizer_step",
        "on_train_batch_end",
    )
    for hook in hooks:
        setattr(monitor, hook, timed(getattr(monitor, hook), spent, "monitor"))
    pictures.on_test_end = timed(pictures.on_test_end, spent, "pictures")
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        for hook in ("measure_norm", "keep_activation_input"):
            clocked = timed(getattr(Measurements, hook), spent, "monitor")
            stack.enter_context(mock.patch.object(Measurements, hook, clocked))
        trainer = pl.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=TensorBoardLogger(folder), callbacks=[monitor, pictures],
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, limit_val_batches=0,
        )  # fmt: skip
        model, data = Classifier(norm=norm), FashionMNIST(val_images=0)
        begun = time.perf_counter()
        trainer.fit(model, data)
        total = time.perf_counter() - begun
        trainer.test(model, data, verbose=False)
    return spent["monitor"] / total, spent["pictures"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--norm", default="custom")
    args = parser.parse_args()

    def say(what: str, values: list[float], unit: str) -> None:
        print(
            f"{what}: {statistics.median(values):.3f}{unit} ({min(values):.3f} to {max(values):.3f})",
            flush=True,
        )

    measured = [shares(args.norm, args.epochs) for _ in range(args.rounds)]
    say("share of the epochs", [100 * share for share, _ in measured], "%")
    say("pictures at the end", [seconds for _, seconds in measured], " s")
    settings = (
        "--trainer.accelerator",
        "cpu",
        "--trainer.limit_val_batches",
        "0",
        "--model.norm",
        args.norm,
    )
    settings += ("--trainer.max_epochs", str(args.epochs))
    ratios = []
    for _ in range(args.rounds):
        speeds = {
            monitor: images_per_second(*settings, "--monitor", monitor)
            for monitor in ("true", "false")
        }
        print({monitor: f"{speed:,.0f} images/s" for monitor, speed in speeds.items()}, flush=True)
        ratios.append(speeds["true"] / speeds["false"])
    say("images per second with it, to those without", ratios, "")


if __name__ == "__main__":
    main()
