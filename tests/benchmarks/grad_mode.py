"""Measure the test accuracy of the norm `article` with and without gradients.

    python tests/benchmarks/grad_mode.py runs/article/article/seed-*/0

The layer of the article calls `torch.is_grad_enabled()` to distinguish training from prediction.
With gradients enabled, for example for a saliency map or an adversarial example, it normalizes with
the statistics of the batch, and updates its running statistics. For the last checkpoint of each
run, the test accuracy is computed under `torch.no_grad()` and with gradients enabled.
"""

import copy
import statistics
import sys
from pathlib import Path

import torch

from bn_lightning import Classifier
from bn_lightning.data import sources
from bn_lightning.training import checkpoints


def main() -> None:
    data = sources.load()
    images, labels = data.test_images[:, None] / 255, data.test_labels
    accuracies: dict[str, list[float]] = {}
    for run in sys.argv[1:]:
        _, checkpoint = checkpoints.load(str(Path(run, "checkpoints", "last.ckpt")))
        model = Classifier(**checkpoint["hyper_parameters"])
        model.load_state_dict(checkpoint["state_dict"])
        model.eval()
        for with_gradients, sizes in ((False, (256,)), (True, (256, 8, 2))):
            for size in sizes:
                network = copy.deepcopy(model)
                with torch.set_grad_enabled(with_gradients):
                    correct = [
                        (network(x).argmax(1) == y)
                        for x, y in zip(images.split(size), labels.split(size), strict=True)
                    ]
                mode = "gradients enabled" if with_gradients else "no_grad"
                name = f"{mode}, batch size {size}"
                accuracies.setdefault(name, []).append(float(torch.cat(correct).float().mean()))
    for name, values in accuracies.items():
        spread = f"{min(values):.3f} to {max(values):.3f}"
        print(f"{name:35} {statistics.mean(values):.3f} ({spread}), n={len(values)}")


if __name__ == "__main__":
    main()
