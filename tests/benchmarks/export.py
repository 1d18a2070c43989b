"""Compare the latency and size of exported files with the original network.

    python tests/benchmarks/export.py [--ckpt runs/lenet/0/checkpoints/best.ckpt] [--threads 1 2]
        [--seconds 4]

The candidates are the network of the checkpoint in PyTorch's inference mode, the .onnx file in ONNX
Runtime, and the .pt2 file from `torch.export.load`. Each one computes logits from uint8 images. In
every round, each candidate has a warm-up call, then the timed calls. Ratios compare a candidate
with the network in the same round. Printed are the median, minimum and maximum over all rounds.
Without --ckpt, the network is an untrained LeNet with the norm of --norm.

Each number of threads is measured in a separate process. As in `fit`, glibc keeps freed memory.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from bn_lightning import LeNet
from bn_lightning.cli import EXPERIMENT
from bn_lightning.deploy.export import export, milliseconds
from bn_lightning.runs.process import keep_freed_memory


def untrained(norm: str, folder: Path) -> Path:
    """Write the checkpoint of an untrained LeNet, and return its path."""
    path = folder / "untrained.ckpt"
    weights = {f"network.{name}": values for name, values in LeNet(norm).state_dict().items()}
    torch.save({"state_dict": weights, "hyper_parameters": {"norm": norm}}, path)
    return path


def measure(ckpt: Path, folder: Path, args: argparse.Namespace) -> None:
    files = {"ONNX Runtime": folder / "model.onnx", ".pt2": folder / "model.pt2"}
    data = {"source": args.source}
    done = {
        candidate: export(str(ckpt), path, EXPERIMENT, data_settings=data)
        for candidate, path in files.items()
    }
    sizes = ", ".join(f"{path.name} {path.stat().st_size:,}" for path in (ckpt, *files.values()))
    print(f"\ncpu, threads: {args.threads[0]}; torch {torch.__version__}; bytes: {sizes}")
    exported_files = {candidate: exported.file for candidate, exported in done.items()}
    candidates = {"eager": done[".pt2"].eager, **exported_files}
    for batch_size, calls in ((1, 20), (256, 4)):
        images = done[".pt2"].inputs[:batch_size]
        measured = milliseconds(candidates, images, args.seconds, calls)
        times = {candidate: np.array(values) for candidate, values in measured.items()}
        print(f"batch size {batch_size}, {len(times['eager'])} rounds")
        for candidate, values in times.items():
            ratios = values / times["eager"]
            spread = f"{np.median(ratios):.3f}  ({ratios.min():.3f} to {ratios.max():.3f})"
            print(f"  {candidate:14} median {np.median(values):8.3f} ms   / eager {spread}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", type=Path, help="checkpoint whose network is exported")
    parser.add_argument("--norm", default="custom", help="norm of the untrained network")
    parser.add_argument("--source", default="auto", help="source of the images")
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        default=[1, 2],
        help="number of CPU threads; each value is measured in a separate process",
    )
    parser.add_argument(
        "--seconds", type=float, default=4, help="duration of the measurement for each batch size"
    )
    args = parser.parse_args()
    if len(args.threads) > 1:
        for threads in args.threads:
            # The last value of a repeated flag is used.
            subprocess.run(
                [sys.executable, "-u", __file__, *sys.argv[1:], "--threads", str(threads)],
                check=True,
            )
        return
    keep_freed_memory()
    torch.set_num_threads(args.threads[0])
    with tempfile.TemporaryDirectory() as folder:
        measure(args.ckpt or untrained(args.norm, Path(folder)), Path(folder), args)


if __name__ == "__main__":
    main()
