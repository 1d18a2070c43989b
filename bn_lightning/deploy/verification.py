"""Whether a file, or a folded network, does what the checkpoint's network does."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bn_lightning.deploy import folding
from bn_lightning.deploy.served import Restored, Run, Served
from bn_lightning.errors import RunFailed, describe_error


class Difference(NamedTuple):
    """Between the outputs of two networks on the same samples.

    `largest` is that of two outputs; `changed` is the number of samples with another class, None
    without classes.
    """

    largest: float
    changed: int | None


class Verification:
    """The outputs of a checkpoint's network on raw samples, for comparison with those of others.

    Args:
        eager: the checkpoint's network.
        inputs: raw samples (N, ...).

    Raises:
        RunFailed: the network cannot be run.
    """

    def __init__(self, eager: Served, inputs: Tensor) -> None:
        self.eager = eager
        self.inputs = inputs
        self.expected = self._outputs(eager)
        self.is_finite = bool(self.expected.isfinite().all())

    def refuse_difference(self, what: str, run: Run) -> Difference:
        """Compare what `run` computes, and return the difference.

        Raises:
            RunFailed: outputs differ by more than the tolerance, or a class differs where the two
                best outputs are further apart than that.
        """
        found, expected = self._outputs(run), self.expected
        allowed = folding.TOLERANCE * max(1.0, float(expected.abs().max()))
        largest = float((found - expected).abs().max())
        is_close, changed, of_classes = largest <= allowed, None, ""
        if self.eager.classifies:
            best, second = expected.topk(2).values.T
            others = found.argmax(1) != expected.argmax(1)
            changed = int(others.sum())
            is_close &= not bool((others & (best - second >= allowed)).any())
            of_classes = f", and {changed:,} of {len(others):,} classes"
        if not is_close:
            raise RunFailed(
                f"{what} differs from the checkpoint's network: {self.eager.output_name} by up to "
                f"{largest:.2g}, where {allowed:.2g} is allowed{of_classes}. Nothing is written."
            )
        return Difference(largest, changed)

    def _outputs(self, run: Run) -> Tensor:
        try:
            # A network may change its input in place.
            return torch.cat([run(batch.clone()) for batch in _batches(self.inputs)])
        except Exception as error:  # the network's own code may raise anything
            raise RunFailed(
                f"The network cannot be run on batches of 1, 7 and 256 {self.eager.noun}: "
                f"{describe_error(error)}"
            ) from error


def metrics_of_test(restored: Restored, inputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Return the metrics of the checkpoint's network on the test set, without the loss."""
    task, preprocessing = restored.task, restored.data.preprocessing
    metrics = {name: getattr(task, name) for name in task.names("test")[1:]}
    if not metrics:
        return {}
    for batch, truth in zip(_batches(inputs), _batches(targets), strict=True):
        step = task.step((preprocessing(batch.clone()), truth), "test")
        for metric in metrics.values():
            metric.update(step.outputs, step.targets)
    # The shortest decimal number that is this one in float32: 0.9, not 0.8999999762.
    return {name: float(str(np.float32(metric.compute()))) for name, metric in metrics.items()}


def _batches(samples: Tensor) -> tuple[Tensor, ...]:
    """Split into batches of 1, 7, and then of 256."""
    return samples.tensor_split([1, *range(8, len(samples), 256)])
