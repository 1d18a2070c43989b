"""Compare the images per second of `fit` with two training loops without Lightning.

    python tests/benchmarks/throughput.py [--rounds 5] [--epochs 2]

Each round runs four programs, each in a new process, with the same network, batch size,
number of threads and 60,000 images:

* bare:       loop over float tensors in memory: forward, loss, backward, optimizer step
* dataloader: the article's loop: torchvision, ToTensor, four workers, accuracy
* fit:        `fit --model.norm builtin` with metrics, TensorBoard, checkpoints and
              progress bar
* custom:     `fit --model.norm custom` with the same features

The first three use PyTorch's norm layer. The output shows the median speed of each
program, and the ratios of programs within the same round.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measured import images_per_second
from torch import nn
from torch.nn import functional as F

PROGRAMS = ("dataloader", "bare", "fit", "custom")
BATCH_SIZE = 256


def make_network() -> tuple[nn.Module, torch.optim.Optimizer]:
    from bn_lightning import LeNet

    torch.manual_seed(0)
    network = LeNet(norm="builtin")
    return network, torch.optim.SGD(network.parameters(), lr=1.0)


def bare(epochs: int) -> float:
    """Return the images per second of the bare loop."""
    from bn_lightning.data import sources

    data = sources.load()
    images = data.train_images.unsqueeze(1).float().div_(255)  # (N, 1, 28, 28)
    labels = data.train_labels
    network, optimizer = make_network()
    start = time.perf_counter()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(BATCH_SIZE):
            optimizer.zero_grad()
            F.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
    return epochs * len(labels) / (time.perf_counter() - start)


def run_article_loop(epochs: int, test_each_epoch: bool = True) -> tuple[float, float]:
    """Train with the article's loop.

    Returns:
        The seconds of training, without the tests, and the last test accuracy. The
        accuracy is 0 if `test_each_epoch` is False.
    """
    from torch.utils.data import DataLoader
    from torchvision.datasets import FashionMNIST
    from torchvision.transforms import ToTensor

    from bn_lightning.data import files, sources

    data = sources.load()
    with tempfile.TemporaryDirectory() as root:
        raw = Path(root, "FashionMNIST", "raw")
        raw.mkdir(parents=True)
        # torchvision requires decompressed files in the IDX format.
        for file in files.FULL:
            content = files.read(files.locate(data.folder, file), file)
            magic_number = 0x0800 + len(file.shape)
            header = b"".join(n.to_bytes(4, "big") for n in (magic_number, *file.shape))
            (raw / file.name).write_bytes(header + content.tobytes())
        train = FashionMNIST(root, train=True, transform=ToTensor())
        test = FashionMNIST(root, train=False, transform=ToTensor())
    loader = DataLoader(train, BATCH_SIZE, shuffle=True, num_workers=4)
    test_loader = DataLoader(test, BATCH_SIZE, num_workers=4)
    network, optimizer = make_network()

    seconds = accuracy = 0.0
    for _ in range(epochs):
        total_loss, total_correct, total = 0.0, 0.0, 0
        start = time.perf_counter()
        network.train()
        for images, labels in loader:
            optimizer.zero_grad()
            logits = network(images)
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                total_loss += float(loss) * len(labels)
                total_correct += float((logits.argmax(1) == labels).sum())
                total += len(labels)
        seconds += time.perf_counter() - start

        if test_each_epoch:
            network.eval()
            correct = 0
            with torch.no_grad():
                for images, labels in test_loader:
                    correct += int((network(images).argmax(1) == labels).sum())
            accuracy = correct / len(test)
    return seconds, accuracy


def dataloader(epochs: int) -> float:
    """Return the images per second of the article's loop."""
    seconds, _ = run_article_loop(epochs, test_each_epoch=False)
    return epochs * 60_000 / seconds


def fit(epochs: int, norm: str) -> float:
    """Return the images per second of `fit`."""
    settings = ("--model.norm", norm, "--trainer.max_epochs", str(epochs))
    return images_per_second(*settings, "--trainer.enable_progress_bar", "true")


# The programs that are measured by this file, run with --side in a new process.
LOOPS = {"bare": bare, "dataloader": dataloader}

# The programs that run `fit`, with their norms.
NORMS = {"fit": "builtin", "custom": "custom"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds (default: 5)")
    parser.add_argument("--epochs", type=int, default=2, help="epochs per run (default: 2)")
    parser.add_argument(
        "--side",
        choices=tuple(LOOPS),
        help="measure only this program, once, in this process",
    )
    args = parser.parse_args()
    if args.side:
        print(LOOPS[args.side](args.epochs))
        return

    speeds: dict[str, list[float]] = {program: [] for program in PROGRAMS}
    for number in range(args.rounds):
        for program in PROGRAMS:
            if program in LOOPS:
                command = [sys.executable, __file__, "--side", program]
                command += ["--epochs", str(args.epochs)]
                process = subprocess.run(command, capture_output=True, text=True, check=True)
                speed = float(process.stdout)
            else:
                speed = fit(args.epochs, NORMS[program])
            speeds[program].append(speed)
            print(f"round {number + 1}  {program:10} {speed:10,.0f} images/s", flush=True)

    settings = f"{args.epochs} epochs of 60,000 images, {args.rounds} rounds"
    print(f"\nthreads: {torch.get_num_threads()}; {settings}")
    for program in PROGRAMS:
        print(f"{program:10} median {statistics.median(speeds[program]):8,.0f} images/s")
    for program, baseline in (("fit", "bare"), ("fit", "dataloader"), ("custom", "bare")):
        pairs = zip(speeds[program], speeds[baseline], strict=True)
        ratios = [speed / base for speed, base in pairs]
        low, high = min(ratios), max(ratios)
        median = statistics.median(ratios)
        print(f"{program} / {baseline}: median {median:.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
