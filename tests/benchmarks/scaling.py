"""Measure the speedup by two processes, and the cost of exact resume.

    python tests/benchmarks/scaling.py [--rounds 5] [--epochs 2] [--batch_sizes 256 1024] [--hooks]

Three variants of `fit` with the custom norm take turns on 60,000 images: one process with all CPU
threads, and two processes that share the threads, without and with sync_batchnorm. Their speed is
measured in images per second. Ratios are printed as median, minimum and maximum over the rounds.

With --hooks, only the cost of resume is measured, within one process. The results are the fractions
of the training time for the hooks of `ExactResume`, and for a checkpoint every 100 steps.
"""

import argparse
import os
import statistics
import tempfile
import time

from measured import images_per_second, timed

VARIANTS = {
    "one process": (),
    "two processes": ("--trainer.devices", "2"),
    "two, sync_batchnorm": ("--trainer.devices", "2", "--trainer.sync_batchnorm", "true"),
}


def fit(epochs, batch_size, *flags):
    """Return the images per second of `fit`. It chooses the number of threads itself."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    settings = ("--trainer.accelerator", "cpu", "--data.batch_size", str(batch_size))
    settings += ("--trainer.max_epochs", str(epochs))
    return images_per_second(*settings, *flags, environment=environment)


def shares(epochs, batch_size):
    """Return the fractions of the training time for the hooks and for the checkpoints."""
    import lightning.pytorch as pl

    from bn_lightning import Classifier, ExactResume, FashionMNIST, WholeCheckpointIO

    spent = {"hooks": 0.0, "saving": 0.0}
    resume = ExactResume(every_n_train_steps=100)
    resume._save = timed(resume._save, spent, "saving")
    for hook in ("on_train_epoch_start", "on_train_batch_start", "on_train_batch_end"):
        setattr(resume, hook, timed(getattr(resume, hook), spent, "hooks"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[resume],
            plugins=[WholeCheckpointIO()],
            enable_checkpointing=True,
        )
        start = time.perf_counter()
        trainer.fit(Classifier(), FashionMNIST(val_images=0, batch_size=batch_size))
        total = time.perf_counter() - start
    return (spent["hooks"] - spent["saving"]) / total, spent["saving"] / total


def spread(values):
    return statistics.median(values), min(values), max(values)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds")
    parser.add_argument("--epochs", type=int, default=2, help="epochs per run")
    parser.add_argument(
        "--batch_sizes", type=int, nargs="+", default=[256, 1024], help="batch sizes"
    )
    parser.add_argument("--hooks", action="store_true", help="measure the cost of exact resume")
    args = parser.parse_args()
    if args.hooks:
        for batch_size in args.batch_sizes:
            rounds = [shares(args.epochs, batch_size) for _ in range(args.rounds)]
            hooks, saving = zip(*rounds, strict=True)
            for name, values in (("hooks", hooks), ("checkpoints every 100 steps", saving)):
                percentages = [100 * value for value in values]
                median, low, high = spread(percentages)
                text = f"{median:.2f}% of the training time ({low:.2f} to {high:.2f})"
                print(f"batch size {batch_size}: {name}: {text}", flush=True)
        return
    for batch_size in args.batch_sizes:
        speeds = {variant: [] for variant in VARIANTS}
        for _ in range(args.rounds):
            for variant, flags in VARIANTS.items():
                speed = fit(args.epochs, batch_size, *flags)
                speeds[variant].append(speed)
                print(f"batch size {batch_size}  {variant:20} {speed:10,.0f} images/s", flush=True)
        for variant in list(VARIANTS)[1:]:
            ratios = [a / b for a, b in zip(speeds[variant], speeds["one process"], strict=True)]
            median, low, high = spread(ratios)
            text = f"{variant} / one process: {median:.3f} ({low:.3f} to {high:.3f})"
            print(f"batch size {batch_size}: {text}", flush=True)


if __name__ == "__main__":
    main()
