"""Measure the cost of monitoring on 60,000 images.

    python tests/benchmarks/monitors.py [--rounds 5] [--epochs 4] [--norm custom] [--network lenet]

The first measurement times the hooks of `NormMonitor` within one process. It prints
their share of the training time, and the seconds for the plots after training.

The second measurement compares the images per second of `fit` with and without
`--monitor`. Each round runs both commands, each in a new process.

Each result is the median over the rounds, with the minimum and maximum.
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


def measure_hooks(norm: str, network: str, epochs: int) -> tuple[float, float]:
    """Train with timed hooks, and return the costs of monitoring.

    Returns:
        The fraction of the training time that the monitor takes, and the seconds that
        the plots after training take.
    """
    seconds = {"monitor": 0.0, "plots": 0.0}
    monitor, plots = NormMonitor(), ClosingPictures()
    hooks = (
        "on_train_batch_start",
        "on_before_backward",
        "on_before_optimizer_step",
        "on_train_batch_end",
    )
    for hook in hooks:
        setattr(monitor, hook, timed(getattr(monitor, hook), seconds, "monitor"))
    plots.on_test_end = timed(plots.on_test_end, seconds, "plots")
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        for hook in ("measure_norm", "keep_activation_input"):
            wrapper = timed(getattr(Measurements, hook), seconds, "monitor")
            stack.enter_context(mock.patch.object(Measurements, hook, wrapper))
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=TensorBoardLogger(folder),
            callbacks=[monitor, plots],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            limit_val_batches=0,
        )
        # With the default learning rate, deep networks would diverge.
        model = Classifier(norm=norm, network=network, lr=0.01)
        data = FashionMNIST(val_images=0)
        start = time.perf_counter()
        trainer.fit(model, data)
        total = time.perf_counter() - start
        trainer.test(model, data, verbose=False)
    return seconds["monitor"] / total, seconds["plots"]


def print_result(label: str, values: list[float], unit: str) -> None:
    low, high = min(values), max(values)
    median = statistics.median(values)
    print(f"{label}: median {median:.3f}{unit} ({low:.3f} to {high:.3f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds (default: 5)")
    parser.add_argument("--epochs", type=int, default=4, help="epochs per run (default: 4)")
    parser.add_argument("--norm", default="custom", help="norm layer (default: custom)")
    parser.add_argument("--network", default="lenet", help="network (default: lenet)")
    args = parser.parse_args()

    costs = [measure_hooks(args.norm, args.network, args.epochs) for _ in range(args.rounds)]
    percentages = [100 * fraction for fraction, _ in costs]
    print_result("share of the training time", percentages, "%")
    print_result("plots after training", [seconds for _, seconds in costs], " s")

    settings = ("--trainer.accelerator", "cpu", "--trainer.limit_val_batches", "0")
    settings += ("--model.norm", args.norm, "--model.network", args.network)
    settings += ("--model.lr", "0.01", "--trainer.max_epochs", str(args.epochs))
    ratios = []
    for _ in range(args.rounds):
        monitored = images_per_second(*settings, "--monitor", "true")
        plain = images_per_second(*settings, "--monitor", "false")
        print(f"monitor: {monitored:,.0f} images/s, no monitor: {plain:,.0f}", flush=True)
        ratios.append(monitored / plain)
    print_result("images per second, monitor / no monitor", ratios, "")


if __name__ == "__main__":
    main()
