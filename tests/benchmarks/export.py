"""Compare the latency and size of exported files with the original network.

    python tests/benchmarks/export.py [--ckpt runs/lenet/0/checkpoints/best.ckpt]
        [--threads 1 2] [--seconds 4]

The candidates are the checkpoint's network in PyTorch's inference mode ("eager"), the
.onnx file in ONNX Runtime, and the .pt2 file loaded by `torch.export.load`. Each
candidate computes logits from uint8 images. Without --ckpt, the network is an untrained
LeNet with the norm set by --norm.

In each round, each candidate runs a warm-up call, then the timed calls. A ratio compares
a candidate with the eager network in the same round. The output shows the median time,
and the median, minimum and maximum of the ratios.

Each number of threads is measured in a separate process. As in `fit`, glibc keeps freed
memory.
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


def save_untrained(norm: str, folder: Path) -> Path:
    """Write the checkpoint of an untrained LeNet, and return its path."""
    path = folder / "untrained.ckpt"
    state = LeNet(norm).state_dict()
    weights = {f"network.{name}": tensor for name, tensor in state.items()}
    torch.save({"state_dict": weights, "hyper_parameters": {"norm": norm}}, path)
    return path


def measure(ckpt: Path, folder: Path, args: argparse.Namespace) -> None:
    """Export the checkpoint in both formats, and print sizes and latencies."""
    paths = {"ONNX Runtime": folder / "model.onnx", ".pt2": folder / "model.pt2"}
    data = {"source": args.source}
    exports = {
        candidate: export(str(ckpt), path, EXPERIMENT, data_settings=data)
        for candidate, path in paths.items()
    }
    sizes = [f"{path.name} {path.stat().st_size:,}" for path in (ckpt, *paths.values())]
    print(f"\ncpu, threads: {args.threads[0]}; torch {torch.__version__}")
    print(f"file sizes in bytes: {', '.join(sizes)}")

    files = {candidate: exported.file for candidate, exported in exports.items()}
    candidates = {"eager": exports[".pt2"].eager, **files}
    for batch_size, calls in ((1, 20), (256, 4)):
        images = exports[".pt2"].inputs[:batch_size]
        measured = milliseconds(candidates, images, args.seconds, calls)
        times = {candidate: np.array(values) for candidate, values in measured.items()}
        print(f"batch size {batch_size}, {len(times['eager'])} rounds")
        for candidate, values in times.items():
            ratios = values / times["eager"]
            low, high = ratios.min(), ratios.max()
            ratio = f"{np.median(ratios):.3f}  ({low:.3f} to {high:.3f})"
            print(f"  {candidate:14} median {np.median(values):8.3f} ms   / eager {ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ckpt", type=Path, help="checkpoint to export (default: an untrained LeNet)"
    )
    parser.add_argument(
        "--norm", default="custom", help="norm of the untrained LeNet (default: custom)"
    )
    parser.add_argument("--source", default="auto", help="source of the images (default: auto)")
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        default=[1, 2],
        help="numbers of CPU threads; each is measured in a separate process (default: 1 2)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=4,
        help="seconds to measure each batch size (default: 4)",
    )
    args = parser.parse_args()
    if len(args.threads) > 1:
        for threads in args.threads:
            # argparse uses the last --threads.
            command = [sys.executable, "-u", __file__, *sys.argv[1:]]
            subprocess.run([*command, "--threads", str(threads)], check=True)
        return
    keep_freed_memory()
    torch.set_num_threads(args.threads[0])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ckpt = args.ckpt or save_untrained(args.norm, folder)
        measure(ckpt, folder, args)


if __name__ == "__main__":
    main()
