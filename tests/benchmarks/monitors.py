"""Measure the cost of monitoring: `fit` with and without `--monitor`, on 60,000 images.

    python tests/benchmarks/monitors.py [--rounds 5] [--epochs 4] [--norm custom]

The first measurement times the hooks of `NormMonitor` within one process, and prints their fraction
of the training time. It also prints the seconds for the images that are drawn after training. The
second measurement compares images per second with and without the monitor. Both commands take
turns, each in a new process. Each value is printed as median, minimum and maximum over the rounds.
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
    """Return the monitor's fraction of the training time, and the seconds for the final images."""
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
            max_epochs=epochs,
            accelerator="cpu",
            logger=TensorBoardLogger(folder),
            callbacks=[monitor, pictures],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            limit_val_batches=0,
        )
        model, data = Classifier(norm=norm), FashionMNIST(val_images=0)
        start = time.perf_counter()
        trainer.fit(model, data)
        total = time.perf_counter() - start
        trainer.test(model, data, verbose=False)
    return spent["monitor"] / total, spent["pictures"]


def show(what: str, values: list[float], unit: str) -> None:
    spread = f"{min(values):.3f} to {max(values):.3f}"
    print(f"{what}: {statistics.median(values):.3f}{unit} ({spread})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds")
    parser.add_argument("--epochs", type=int, default=4, help="epochs per run")
    parser.add_argument("--norm", default="custom", help="norm of LeNet")
    args = parser.parse_args()
    measured = [shares(args.norm, args.epochs) for _ in range(args.rounds)]
    show("fraction of the training time", [100 * share for share, _ in measured], "%")
    show("images after training", [seconds for _, seconds in measured], " s")
    settings = ("--trainer.accelerator", "cpu", "--trainer.limit_val_batches", "0")
    settings += ("--model.norm", args.norm, "--trainer.max_epochs", str(args.epochs))
    ratios = []
    for _ in range(args.rounds):
        speeds = [images_per_second(*settings, "--monitor", value) for value in ("true", "false")]
        print("with monitor {:,.0f} images/s, without {:,.0f}".format(*speeds), flush=True)
        ratios.append(speeds[0] / speeds[1])
    show("images per second, with monitor / without", ratios, "")


if __name__ == "__main__":
    main()
