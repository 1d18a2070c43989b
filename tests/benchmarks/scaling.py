"""What several processes bring, and what exact resume costs.

    python tests/benchmarks/scaling.py [--rounds 5] [--epochs 2] [--batch_sizes 256 1024] [--hooks]

Images per second of `fit` on the 60,000 images, custom norm, the sides in turn: one process with all threads, and two
processes that share them, without and with sync_batchnorm. Prints the ratio of each round: median, lowest, highest.
With --hooks only the cost of resume: the share of the training time that `ExactResume` takes within one process, and
that of its checkpoints, one every 100 steps.
"""

import argparse
import os
import statistics
import tempfile
import time

from measured import images_per_second, timed

SIDES = {
    "one process": (),
    "two": ("--trainer.devices", "2"),
    "two, sync": ("--trainer.devices", "2", "--trainer.sync_batchnorm", "true"),
}


def fit(epochs, batch_size, *flags):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    settings = ("--trainer.accelerator", "cpu", "--data.batch_size", str(batch_size))
    settings += ("--trainer.max_epochs", str(epochs))
    return images_per_second(*settings, *flags, environment=environment)


def shares(epochs, batch_size):
    """Of the training time: what the hooks take without the checkpoints, and the checkpoints."""
    import lightning.pytorch as pl

    from bn_lightning import Classifier, ExactResume, FashionMNIST, WholeCheckpointIO

    spent = {"hooks": 0.0, "saving": 0.0}
    resume = ExactResume(every_n_train_steps=100)

    resume._save = timed(resume._save, spent, "saving")
    for hook in ("on_train_epoch_start", "on_train_batch_start", "on_train_batch_end"):
        setattr(resume, hook, timed(getattr(resume, hook), spent, "hooks"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=epochs, accelerator="cpu", default_root_dir=folder, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[resume], plugins=[WholeCheckpointIO()], enable_checkpointing=True,
        )  # fmt: skip
        begun = time.perf_counter()
        trainer.fit(Classifier(), FashionMNIST(val_images=0, batch_size=batch_size))
        total = time.perf_counter() - begun
    return (spent["hooks"] - spent["saving"]) / total, spent["saving"] / total


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--hooks", action="store_true")
    args = parser.parse_args()
    if args.hooks:
        for batch_size in args.batch_sizes:
            both = [shares(args.epochs, batch_size) for _ in range(args.rounds)]
            for name, values in zip(
                ("hooks", "a checkpoint every 100 steps"), zip(*both, strict=True), strict=True
            ):
                values = [100 * value for value in values]
                middle, low, high = statistics.median(values), min(values), max(values)
                print(
                    f"batch {batch_size}: {name}: {middle:.2f}% of the time ({low:.2f} to {high:.2f})",
                    flush=True,
                )
        return
    for batch_size in args.batch_sizes:
        speeds = {side: [] for side in SIDES}
        for _ in range(args.rounds):
            for side, flags in SIDES.items():
                speeds[side].append(fit(args.epochs, batch_size, *flags))
                print(
                    f"batch {batch_size}  {side:12} {speeds[side][-1]:10,.0f} images/s", flush=True
                )
        for side in list(SIDES)[1:]:
            ratios = [a / b for a, b in zip(speeds[side], speeds["one process"], strict=True)]
            middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
            print(
                f"batch {batch_size}: {side} / one process: {middle:.3f} ({low:.3f} to {high:.3f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
