"""Images per second of `fit` with everything on, beside two loops without Lightning.

    python tests/benchmarks/throughput.py [--rounds 5] [--epochs 2]

Four sides take turns, each in a process of its own with the same network, batch and threads on the 60,000 images:

* bare:       a plain loop over float tensors in memory: forward, loss, backward, step, and nothing else
* dataloader: a loop as the article's book writes it: torchvision, ToTensor, four workers, accuracy by an accumulator
* fit:        `fit --model.norm builtin` with metrics, TensorBoard, checkpoints and progress bar
* custom:     the same with `--model.norm custom`

bare, dataloader and fit use torch's own norm. Prints each side's median, and the ratios of the sides in each round.
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

SIDES = ("dataloader", "bare", "fit", "custom")
BATCH_SIZE = 256


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    from bn_lightning import LeNet

    torch.manual_seed(0)
    network = LeNet(norm="builtin")
    return network, torch.optim.SGD(network.parameters(), lr=1.0)


def bare(epochs: int) -> float:
    from bn_lightning.data import sources

    data = sources.load()
    images, labels = data.train_images.unsqueeze(1).float().div_(255), data.train_labels
    network, optimizer = make()
    start = time.perf_counter()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(BATCH_SIZE):
            optimizer.zero_grad()
            F.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
    return epochs * len(labels) / (time.perf_counter() - start)


def article(epochs: int, tests: bool = True) -> tuple[float, float]:
    """Seconds of training by a loop as the article's book writes it, and the accuracy of the last of its tests.

    It tests after each epoch, which is not counted as training.
    """
    from torch.utils.data import DataLoader
    from torchvision.datasets import FashionMNIST
    from torchvision.transforms import ToTensor

    from bn_lightning.data import files, sources

    data = sources.load()
    with tempfile.TemporaryDirectory() as root:
        raw = Path(root, "FashionMNIST", "raw")
        raw.mkdir(parents=True)
        for file in files.WHOLE:  # torchvision wants them decompressed
            content = files.read(files.locate(data.place, file), file)
            header = b"".join(n.to_bytes(4, "big") for n in (0x0800 + len(file.shape), *file.shape))
            (raw / file.name).write_bytes(header + content.tobytes())
        train, test = (
            FashionMNIST(root, train=is_train, transform=ToTensor()) for is_train in (True, False)
        )
    loader = DataLoader(train, BATCH_SIZE, shuffle=True, num_workers=4)
    test_loader = DataLoader(test, BATCH_SIZE, num_workers=4)
    network, optimizer = make()
    seconds = accuracy = 0.0
    for _ in range(epochs):
        total_loss, total_right, total = 0.0, 0.0, 0
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
                total_right += float((logits.argmax(1) == labels).sum())
                total += len(labels)
        seconds += time.perf_counter() - start
        if tests:
            network.eval()
            with torch.no_grad():
                right = sum(
                    int((network(images).argmax(1) == labels).sum())
                    for images, labels in test_loader
                )
            accuracy = right / len(test)
    return seconds, accuracy


def dataloader(epochs: int) -> float:
    return epochs * 60_000 / article(epochs, tests=False)[0]


def fit(epochs: int, norm: str) -> float:
    settings = (
        "--model.norm",
        norm,
        "--trainer.max_epochs",
        str(epochs),
        "--trainer.enable_progress_bar",
        "true",
    )
    return images_per_second(*settings)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument(
        "--side", choices=("bare", "dataloader"), help="measure this side once, in this process"
    )
    args = parser.parse_args()
    if args.side:
        print({"bare": bare, "dataloader": dataloader}[args.side](args.epochs))
        return

    speeds: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(args.rounds):
        for side in SIDES:
            if side in ("bare", "dataloader"):
                command = [sys.executable, __file__, "--side", side, "--epochs", str(args.epochs)]
                speed = float(
                    subprocess.run(command, capture_output=True, text=True, check=True).stdout
                )
            else:
                speed = fit(args.epochs, {"fit": "builtin"}.get(side, side))
            speeds[side].append(speed)
            print(f"round {number + 1}  {side:10} {speed:10,.0f} images/s", flush=True)
    print(
        f"\n{torch.get_num_threads()} threads, {args.epochs} epochs of 60,000 images, {args.rounds} rounds"
    )
    for side in SIDES:
        print(f"{side:10} median {statistics.median(speeds[side]):8,.0f} images/s")
    for above, below in (("fit", "bare"), ("fit", "dataloader"), ("custom", "bare")):
        ratios = [a / b for a, b in zip(speeds[above], speeds[below], strict=True)]
        low, high = min(ratios), max(ratios)
        print(
            f"{above} / {below}: median {statistics.median(ratios):.3f}, from {low:.3f} to {high:.3f}"
        )


if __name__ == "__main__":
    main()
