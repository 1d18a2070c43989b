"""Measure the memory of `fit` on a folder of many pictures, relative to one of few.

    python tests/benchmarks/loader_memory.py [--pictures 2000 20000] [--resize 128] [--workers 2]

Each folder has hard links to the same 200 JPEGs. All of them are listed, checked and split.
A run trains a small network for one epoch, and evaluates it on all validation and test
pictures.

The memory is the proportional set size (PSS), summed over all processes of the run. The
output shows the largest sum while the run lasts, and the difference between the folders. The
code of libraries is shared with other programs of the machine, so its part depends on what
else runs. The second number of each line leaves it out.

Linux only.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from photographs import write_photographs

REAL = 200
SETTINGS = (
    *("--model.network", "resnet", "--model.network_args.depth", "8"),
    *("--model.network_args.width", "4", "--data.batch_size", "64", "--data.normalize", "true"),
    *("--data.flip", "true", "--data.augment", '[{"name": "ColorJitter"}]'),
    *("--trainer.max_epochs", "1"),
    *("--trainer.accelerator", "cpu", "--data.dataset", "folder"),
)


def write_links(photographs: list[Path], folder: Path, count: int) -> None:
    for index in range(count):
        photograph = photographs[index % len(photographs)]
        link = folder / photograph.parent.name / f"{index:06}.jpg"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.hardlink_to(photograph)


def processes_of(session: int) -> list[Path]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getsid(int(process.name)) == session:
                found.append(process)
    return found


def memory_of(session: int) -> tuple[int, int]:
    """Return the PSS of all processes of a session in KiB, and that without files.

    Both are 0 if a process starts or ends meanwhile: the shares of the others change, and
    memory would be counted twice.
    """
    processes = processes_of(session)
    total = without_files = 0
    with contextlib.suppress(OSError):
        for process in processes:
            lines = (process / "smaps_rollup").read_text().splitlines()[1:]
            sizes = {name: int(size.split()[0]) for name, size in (x.split(":") for x in lines)}
            total += sizes["Pss"]
            without_files += sizes["Pss"] - sizes["Pss_File"]
    return (total, without_files) if processes_of(session) == processes else (0, 0)


def peak_memory(folder: Path, side: int, workers: int) -> tuple[float, float]:
    """Run `fit`, and return the largest memory in MB, with and without files."""
    command = [sys.executable, "-m", "bn_lightning", "fit", *SETTINGS]
    command += ["--data.dataset_args.path", str(folder / "pictures"), "--data.root", str(folder)]
    command += ["--data.resize", str(side), "--data.workers", str(workers)]
    command += ["--trainer.default_root_dir", str(folder / "runs")]
    peaks = [0, 0]
    with (folder / "log").open("w+") as log:
        run = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        while run.poll() is None:
            peaks = [max(pair) for pair in zip(peaks, memory_of(run.pid), strict=True)]
            time.sleep(0.1)
        log.seek(0)
        assert run.returncode == 0, log.read()
    return peaks[0] * 1024 / 1e6, peaks[1] * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pictures",
        type=int,
        nargs=2,
        default=[2000, 20_000],
        help="number of pictures in the two folders (default: 2000 20000)",
    )
    parser.add_argument("--resize", type=int, default=128, help="height and width (default: 128)")
    parser.add_argument("--workers", type=int, default=2, help="worker processes (default: 2)")
    args = parser.parse_args()
    peaks = []
    with tempfile.TemporaryDirectory() as name:
        photographs = write_photographs(Path(name, "photographs"), REAL, 160, 140)
        for count in args.pictures:
            folder = Path(name, str(count))
            write_links(photographs, folder / "pictures", count)
            peaks.append(peak_memory(folder, args.resize, args.workers))
            total, without_files = peaks[-1]
            print(f"{count:7,} pictures: {total:7.1f} MB, {without_files:7.1f} MB", flush=True)
    total, without_files = (many - few for few, many in zip(*peaks, strict=True))
    print(f"     difference: {total:7.1f} MB, {without_files:7.1f} MB")


if __name__ == "__main__":
    main()
