"""Latency and size of exported files beside the network that they were made of.

    python tests/benchmarks/export.py [--ckpt runs/lenet/0/checkpoints/best.ckpt] [--threads 1 2] [--seconds 4]

The sides are the checkpoint's network as torch runs it in inference mode, the .onnx in ONNX Runtime, and the .pt2 as
`torch.export.load` gives it, each from uint8 images to logits. They take turns: in every round each has a call to warm
up and then some timed ones. A ratio is that of a side to the network in the same round, printed as median, lowest and
highest over the rounds. Without --ckpt the network is LeNet with the norm of --norm, untrained.

Each number of threads is measured in a process of its own. As in `fit`, glibc keeps freed memory, on all sides.
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
    path = folder / "untrained.ckpt"
    weights = {f"network.{name}": values for name, values in LeNet(norm).state_dict().items()}
    torch.save({"state_dict": weights, "hyper_parameters": {"norm": norm}}, path)
    return path


def measure(ckpt: Path, folder: Path, args: argparse.Namespace) -> None:
    files = {"ONNX Runtime": folder / "model.onnx", ".pt2": folder / "model.pt2"}
    data = {"source": args.source}
    done = {
        side: export(str(ckpt), path, EXPERIMENT, data_settings=data)
        for side, path in files.items()
    }
    sizes = ", ".join(f"{path.name} {path.stat().st_size:,}" for path in (ckpt, *files.values()))
    print(f"\ncpu, threads: {args.threads[0]}; torch {torch.__version__}; bytes: {sizes}")
    sides = {
        "eager": done[".pt2"].eager,
        **{side: exported.file for side, exported in done.items()},
    }
    for batch_size, calls in ((1, 20), (256, 4)):
        images = done[".pt2"].inputs[:batch_size]
        times = {
            side: np.array(values)
            for side, values in milliseconds(sides, images, args.seconds, calls).items()
        }
        print(f"batch of {batch_size}, {len(times['eager'])} rounds")
        for side, values in times.items():
            ratios = values / times["eager"]
            spread = f"{np.median(ratios):.3f}  ({ratios.min():.3f} to {ratios.max():.3f})"
            print(f"  {side:14} median {np.median(values):8.3f} ms   / eager {spread}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", type=Path)
    parser.add_argument("--norm", default="custom", help="of the untrained network")
    parser.add_argument("--source", default="auto", help="of the images")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1, 2], help="a process for each number"
    )
    parser.add_argument("--seconds", type=float, default=4, help="for each size of batch")
    args = parser.parse_args()
    if len(args.threads) > 1:
        for threads in args.threads:  # of a flag given twice the last counts
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
