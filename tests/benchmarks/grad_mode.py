"""Measure the test accuracy of the norm `article` with and without gradients.

    python tests/benchmarks/grad_mode.py runs/article/article/seed-*/0

The article's layer calls `torch.is_grad_enabled()` to distinguish training from
prediction. If gradients are enabled, for example for a saliency map or an adversarial
example, the layer normalizes with batch statistics and updates its running statistics.

The arguments are run folders. For the last checkpoint of each run, the test accuracy is
computed under `torch.no_grad()` and with gradients enabled.
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
    images = data.test_images[:, None] / 255  # (N, 1, 28, 28)
    labels = data.test_labels
    accuracies: dict[str, list[float]] = {}
    for run in sys.argv[1:]:
        _, checkpoint = checkpoints.load(str(Path(run, "checkpoints", "last.ckpt")))
        model = Classifier(**checkpoint["hyper_parameters"])
        model.load_state_dict(checkpoint["state_dict"])
        model.eval()
        for with_gradients, sizes in ((False, (256,)), (True, (256, 8, 2))):
            for size in sizes:
                # With gradients, the forward pass updates the running statistics.
                network = copy.deepcopy(model)
                batches = zip(images.split(size), labels.split(size), strict=True)
                with torch.set_grad_enabled(with_gradients):
                    correct = [(network(x).argmax(1) == y) for x, y in batches]
                accuracy = float(torch.cat(correct).float().mean())
                mode = "gradients enabled" if with_gradients else "no_grad"
                name = f"{mode}, batch size {size}"
                accuracies.setdefault(name, []).append(accuracy)

    for name, values in accuracies.items():
        spread = f"{min(values):.3f} to {max(values):.3f}"
        print(f"{name:35} {statistics.mean(values):.3f} ({spread}), n={len(values)}")


if __name__ == "__main__":
    main()
