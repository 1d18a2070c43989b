"""A callback that writes figures of the test results to TensorBoard."""

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
from bn_lightning.norms import recognition
from bn_lightning.training.data_module import DataModule

Draw = Callable[[], Image.Image | None]


class ClosingPictures(pl.Callback):
    """Writes figures to TensorBoard at the end of a test, under Images and Graphs.

    The figures are the confusion matrix, the misclassified samples with the highest
    probability, the filters of the first layer, and the network's graph. A first layer
    without convolution is drawn if it has one weight per pixel and channel of an image.

    The confusion matrix requires the task's attribute `confusion`. The misclassified
    samples also require logits (B, C) from `test_step`, and a `DataModule` that
    implements `draw`. Figures that do not apply are omitted. A figure that fails causes
    a warning.

    Args:
        mistakes: number of misclassified samples to show.
    """

    def __init__(self, mistakes: int = 25) -> None:
        self.mistakes = mistakes
        self._reset()

    def _reset(self) -> None:
        # Probability, prediction, target and network input of the samples to show.
        self._worst: list[Tensor] = []
        self._example: Tensor | None = None  # network input (1, ...)
        self._worst_failed = False

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._reset()

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
        has_logits = isinstance(outputs, Tensor) and outputs.dim() == 2
        if _confusion(pl_module) is None or not has_logits or self._worst_failed:
            return
        # After a failure the other batches are skipped.
        self._worst_failed = True
        with _warn_on_failure("figure of misclassified samples"):
            self._keep_worst(outputs, *batch)
            self._worst_failed = False
        if self._worst_failed:
            self._worst = []

    def _keep_worst(self, logits: Tensor, inputs: Tensor, targets: Tensor) -> None:
        """Add a batch to the misclassified samples, and keep those with the highest probability."""
        probability, prediction = logits.float().softmax(1).max(1)
        probability = probability.where(prediction != targets, -1.0)
        samples = [probability, prediction, targets, inputs]
        if self._worst:
            samples = [torch.cat(pair) for pair in zip(self._worst, samples, strict=True)]
        keep = samples[0].topk(min(self.mistakes, len(samples[0]))).indices
        self._worst = [values[keep] for values in samples]

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
        """Gather the samples of all ranks; a collective call."""
        self._worst = [values.cpu() for values in self._worst]
        if trainer.world_size > 1:
            ranks: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(ranks, self._worst)
            self._worst = [torch.cat(values) for values in zip(*filter(None, ranks), strict=True)]

    def _figures(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Draw]:
        """Return a drawing function for each figure that applies, by tag."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        counts = _confusion(pl_module)
        figures: dict[str, Draw] = {}
        if counts is None:
            print(
                "TensorBoard shows no confusion matrix and no misclassified samples: "
                "this task has no classes",
                flush=True,
            )
        else:
            # Classes without names are numbered.
            classes = getattr(data, "classes", None) or range(len(counts))
            names = [drawing.legible(str(name), label) for label, name in enumerate(classes)]
            figures["confusion_matrix"] = partial(_draw_confusion, counts, names)
            figures["most_confident_mistakes"] = partial(self._draw_worst, data, names)
        figures["first_layer_filters"] = partial(_draw_filters, pl_module, self._example)
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
                "TensorBoard shows no misclassified samples: "
                "the data module does not implement draw()",
                flush=True,
            )
            return None
        captions = [
            f"{names[prediction[i]]} {probability[i]:.1%}\ntrue: {names[targets[i]]}" for i in order
        ]
        return drawing.grid(pictures, captions)


def _one_input(batch: Any) -> Tensor | None:
    """Return the first input of a batch, (1, ...); None if it is not a tensor."""
    inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(inputs, Tensor) or not inputs.dim() or not len(inputs):
        return None
    return inputs[:1].clone()


def _confusion(pl_module: pl.LightningModule) -> Tensor | None:
    return getattr(pl_module, "confusion", None)


def _draw_confusion(counts: Tensor, names: list[str]) -> Image.Image:
    return drawing.confusion(counts, names[: len(counts)])


def _draw_filters(pl_module: pl.LightningModule, example: Tensor | None) -> Image.Image | None:
    """Draw the weights of the first layer, given a network input (1, ...)."""
    weights = (p for p in pl_module.parameters() if p.dim() in (2, 4))
    # The parameters of a norm may have the shape (1, C) or (1, C, 1, 1).
    weight = next((p for p in weights if not recognition.are_channel_values([p])), None)
    if weight is None:
        return None
    if weight.dim() == 2:
        # A linear layer with one weight for each pixel and channel of an image.
        if example is None or example.dim() != 4 or example.numel() != weight.size(1):
            return None
        return drawing.filters(weight.view(-1, *example.shape[1:]))
    return drawing.filters(weight)


@contextmanager
def _warn_on_failure(figure: str) -> Iterator[None]:
    """Turn an exception into a warning, since a figure must not end a run."""
    try:
        yield
    except Exception as error:
        reason = describe_error(error)
        warnings.warn(f"TensorBoard does not show the {figure}: {reason}", stacklevel=3)
