"""Measure the speedup of two processes, and the cost of exact resume.

    python tests/benchmarks/scaling.py [--rounds 5] [--epochs 2]
        [--batch_sizes 256 1024] [--hooks]

Each round measures the images per second of three variants of `fit` with the custom
norm, on 60,000 images: one process with all CPU threads, two processes that share the
threads, and the same two processes with sync_batchnorm. A ratio compares two variants
within the same round. The output shows the median ratio over the rounds, with the
minimum and maximum.

With --hooks, only the cost of resume is measured, within one process. The results are
the percentages of the training time that the hooks of `ExactResume` take, and that a
checkpoint every 100 steps takes.
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
    """Return the images per second of `fit`, which sets the number of threads itself."""
    environment = dict(os.environ)
    environment.pop("OMP_NUM_THREADS", None)
    settings = ("--trainer.accelerator", "cpu", "--data.batch_size", str(batch_size))
    settings += ("--trainer.max_epochs", str(epochs))
    return images_per_second(*settings, *flags, environment=environment)


def measure_resume(epochs, batch_size):
    """Return the fractions of the training time that hooks and checkpoints take."""
    import lightning.pytorch as pl

    from bn_lightning import Classifier, ExactResume, FashionMNIST, WholeCheckpointIO

    seconds = {"hooks": 0.0, "saving": 0.0}
    resume = ExactResume(every_n_train_steps=100)
    resume._save = timed(resume._save, seconds, "saving")
    for hook in ("on_train_epoch_start", "on_train_batch_start", "on_train_batch_end"):
        setattr(resume, hook, timed(getattr(resume, hook), seconds, "hooks"))
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
    # The hooks save the checkpoints, so their time includes the time of saving.
    hooks = seconds["hooks"] - seconds["saving"]
    return hooks / total, seconds["saving"] / total


def median_and_range(values):
    return statistics.median(values), min(values), max(values)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds (default: 5)")
    parser.add_argument("--epochs", type=int, default=2, help="epochs per run (default: 2)")
    parser.add_argument(
        "--batch_sizes",
        type=int,
        nargs="+",
        default=[256, 1024],
        help="global batch sizes (default: 256 1024)",
    )
    parser.add_argument(
        "--hooks", action="store_true", help="measure the cost of exact resume instead"
    )
    args = parser.parse_args()
    compare = compare_resume if args.hooks else compare_processes
    for batch_size in args.batch_sizes:
        compare(batch_size, args.epochs, args.rounds)


def compare_resume(batch_size, epochs, rounds):
    """Print the cost of the hooks of `ExactResume` and of its checkpoints."""
    fractions = [measure_resume(epochs, batch_size) for _ in range(rounds)]
    hooks, saving = zip(*fractions, strict=True)
    for name, values in (("hooks", hooks), ("checkpoints every 100 steps", saving)):
        median, low, high = median_and_range([100 * value for value in values])
        text = f"{median:.2f}% of the training time ({low:.2f} to {high:.2f})"
        print(f"batch size {batch_size}: {name}: median {text}", flush=True)


def compare_processes(batch_size, epochs, rounds):
    """Print the speed of each variant, and the ratios to the first one."""
    speeds = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        for variant, flags in VARIANTS.items():
            speed = fit(epochs, batch_size, *flags)
            speeds[variant].append(speed)
            print(f"batch size {batch_size}  {variant:20} {speed:10,.0f} images/s", flush=True)

    baseline, *others = VARIANTS
    for variant in others:
        pairs = zip(speeds[variant], speeds[baseline], strict=True)
        median, low, high = median_and_range([speed / base for speed, base in pairs])
        text = f"median {median:.3f} ({low:.3f} to {high:.3f})"
        print(f"batch size {batch_size}: {variant} / {baseline}: {text}", flush=True)


if __name__ == "__main__":
    main()
