"""A callback that shows in TensorBoard, after a test, what the network gets wrong."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from bn_lightning.errors import describe_error
from bn_lightning.monitoring import dashboard, drawing
from bn_lightning.training.data_module import DataModule

Draw = Callable[[], Image.Image | None]


class ClosingPictures(pl.Callback):
    """Shows figures at the end of a test, in TensorBoard under Images and Graphs.

    These are the confusion matrix, the misclassified samples with the highest probability, the
    filters of the first convolution, and the network's graph. The first is drawn from the task's
    `confusion`. The second needs classes too, logits (B, C) from `test_step`, and a `DataModule`
    that can `draw` its samples. What does not apply is left out, and a figure that fails is a
    warning.

    Args:
        mistakes: how many misclassified samples are shown.
    """

    def __init__(self, mistakes: int = 25) -> None:
        self.mistakes = mistakes
        self._begin()

    def _begin(self) -> None:
        # Probability, prediction, target and network input of the samples to be shown.
        self._worst: list[Tensor] = []
        self._example: Tensor | None = None  # one network input
        self._has_failed = False

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin()

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not dashboard.has_tensorboard(trainer):
            return
        if self._example is None:
            self._example = _one_input(batch)
        is_classified = isinstance(outputs, Tensor) and outputs.dim() == 2
        if _confusion(pl_module) is None or not is_classified or self._has_failed:
            return
        self._has_failed = True
        with _warn_on_failure("figure of misclassified samples"):
            self._keep_worst(outputs, *batch)
            self._has_failed = False
        if self._has_failed:  # then no other batch is tried
            self._worst = []

    def _keep_worst(self, logits: Tensor, inputs: Tensor, targets: Tensor) -> None:
        """Keep the misclassified samples with the highest probability, also of this batch."""
        probability, prediction = logits.float().softmax(1).max(1)
        probability = probability.where(prediction != targets, -1.0)
        found = [probability, prediction, targets, inputs]
        if self._worst:
            found = [torch.cat(pair) for pair in zip(self._worst, found, strict=True)]
        keep = found[0].topk(min(self.mistakes, len(found[0]))).indices
        self._worst = [values[keep] for values in found]

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not dashboard.has_tensorboard(trainer):
            return
        with _warn_on_failure("figure of misclassified samples"):
            self._gather_worst(trainer)
        if not trainer.is_global_zero:
            return
        for tag, draw in self._figures(trainer, pl_module).items():
            with _warn_on_failure(f"figure {tag}"):
                picture = draw()
                for writer in dashboard.writers(trainer) if picture is not None else ():
                    pixels = np.asarray(picture)
                    writer.add_image(tag, pixels, trainer.global_step, dataformats="HWC")
        network = getattr(pl_module, "network", None)
        if self._example is not None and network is not None:
            for writer in dashboard.writers(trainer):
                dashboard.add_graph(writer, network, self._example)

    def _gather_worst(self, trainer: pl.Trainer) -> None:
        """Take the samples of all ranks together. Every rank has to call it."""
        self._worst = [values.cpu() for values in self._worst]
        if trainer.world_size > 1:
            of_all: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(of_all, self._worst)
            self._worst = [torch.cat(values) for values in zip(*filter(None, of_all), strict=True)]

    def _figures(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Draw]:
        """Return what draws each figure that applies, by tag."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        counts = _confusion(pl_module)
        figures: dict[str, Draw] = {}
        if counts is None:
            print(
                "no confusion matrix or figures of misclassified samples: this task has no classes",
                flush=True,
            )
        else:
            # Without names the classes are numbered.
            classes = getattr(data, "classes", None) or range(len(counts))
            names = [str(name) for name in classes]
            figures["confusion_matrix"] = partial(_draw_confusion, counts, names)
            figures["most_confident_mistakes"] = partial(self._draw_worst, data, names)
        figures["first_layer_filters"] = partial(_draw_filters, pl_module)
        return figures

    def _draw_worst(self, data: Any, names: list[str]) -> Image.Image | None:
        if not self._worst:
            return None
        probability, prediction, targets, inputs = self._worst
        order = probability.argsort(descending=True).tolist()
        order = [i for i in order if probability[i] >= 0][: self.mistakes]
        if not order:
            return None
        pictures = data.draw(inputs[order]) if isinstance(data, DataModule) else None
        if pictures is None:
            print(
                "no figure of misclassified samples: the data module draws no pictures", flush=True
            )
            return None
        captions = [
            f"{names[prediction[i]]} {probability[i]:.1%}\nis {names[targets[i]]}" for i in order
        ]
        return drawing.grid(pictures, captions)


def _one_input(batch: Any) -> Tensor | None:
    """Return the first sample of a batch (1, ...): of the batch itself, or of its first part."""
    inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(inputs, Tensor) or not inputs.dim() or not len(inputs):
        return None
    return inputs[:1].clone()


def _confusion(pl_module: pl.LightningModule) -> Tensor | None:
    return getattr(pl_module, "confusion", None)


def _draw_confusion(counts: Tensor, names: list[str]) -> Image.Image:
    return drawing.confusion(counts, names[: len(counts)])


def _draw_filters(pl_module: pl.LightningModule) -> Image.Image | None:
    weight = next((p for p in pl_module.parameters() if p.dim() == 4), None)
    return None if weight is None else drawing.filters(weight)


@contextmanager
def _warn_on_failure(figure: str) -> Iterator[None]:
    """Turn a failure into a warning: a figure must not end a run whose results are complete."""
    try:
        yield
    except Exception as error:
        reason = describe_error(error)
        warnings.warn(f"TensorBoard gets no {figure}: {reason}", stacklevel=3)
