"""Verification that an exported file or a folded network matches the checkpoint's network.

The allowed difference of two outputs is 1e-5 of the largest output, or 10 times the
rounding error of the network itself, if that is larger. The rounding error is the
largest difference between the outputs in float32 and in float64. It grows with the
number of layers.
"""

import copy
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bn_lightning.deploy.served import Forward, Restored, Served
from bn_lightning.errors import RunFailed, describe_error

# The allowed difference, relative to the largest output and to the rounding error. In
# networks of 7 to 59 folded layers, differences were at most 2.1 rounding errors.
TOLERANCE = 1e-5
ROUNDING_ERRORS = 10
# The rounding error is measured on at most this number of samples.
MEASURED_SAMPLES = 264


class Difference(NamedTuple):
    """Difference between the outputs of two networks on the same samples.

    Attributes:
        largest: the largest absolute difference of two outputs.
        allowed: the largest difference that is accepted.
        changed: the number of samples with a different predicted class; None without
            classes.
    """

    largest: float
    allowed: float
    changed: int | None


class Verification:
    """Outputs of a checkpoint's network on raw samples, and their comparison with other outputs.

    Args:
        eager: the checkpoint's network.
        inputs: raw samples (N, ...).

    Attributes:
        allowed: the allowed difference of two outputs.

    Raises:
        RunFailed: the network cannot be run.
    """

    def __init__(self, eager: Served, inputs: Tensor) -> None:
        self.eager = eager
        self.inputs = inputs
        self.expected = self._outputs(eager)
        self.is_finite = bool(self.expected.isfinite().all())
        relative = TOLERANCE * float(self.expected.abs().max())
        self.allowed = max(relative, ROUNDING_ERRORS * self._rounding_error())

    def verify(self, name: str, forward: Forward) -> Difference:
        """Return the difference between the outputs of `forward` and the expected outputs.

        Args:
            name: the subject of the error message.

        Raises:
            RunFailed: an output differs by more than allowed; or a predicted class
                differs although the two largest outputs are further apart than this.
        """
        found, expected, allowed = self._outputs(forward), self.expected, self.allowed
        largest = float((found - expected).abs().max())
        is_close, changed, class_changes = largest <= allowed, None, ""
        if self.eager.has_classes:
            best, second = expected.topk(2).values.T
            differs = found.argmax(1) != expected.argmax(1)
            changed = int(differs.sum())
            is_close &= not bool((differs & (best - second >= allowed)).any())
            class_changes = f", and {changed:,} of {len(differs):,} predicted classes differ"
        if not is_close:
            raise RunFailed(
                f"{name} does not match the checkpoint's network: {self.eager.output_name} differ "
                f"by up to {largest:.2g} (allowed: {allowed:.2g}){class_changes}. No file was "
                "written."
            )
        return Difference(largest, allowed, changed)

    def _rounding_error(self) -> float:
        """Return the largest difference between the network's outputs in float32 and float64."""
        network = copy.deepcopy(self.eager.network).double()
        preprocessing, inputs = self.eager.preprocessing, self.inputs[:MEASURED_SAMPLES]
        try:
            batches = _batches(inputs)
            precise = torch.cat([network(preprocessing(b.clone()).double()) for b in batches])
        except Exception:
            # The network's own code may not support float64, and raise anything.
            return 0.0
        return float((self.expected[: len(precise)] - precise).abs().max())

    def _outputs(self, forward: Forward) -> Tensor:
        try:
            # A network may change its input in place.
            return torch.cat([forward(batch.clone()) for batch in _batches(self.inputs)])
        except Exception as error:
            # The network's own code may raise anything.
            raise RunFailed(
                "The network must accept batches of 1, 7 and 256 "
                f"{self.eager.sample_noun}, but raises an error: {describe_error(error)}"
            ) from error


def compute_test_metrics(restored: Restored, inputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Compute the metrics of the checkpoint's network on the test set, without the loss."""
    task, preprocessing = restored.task, restored.data.preprocessing
    metrics = {name: getattr(task, name) for name in task.names("test")[1:]}
    if not metrics:
        return {}
    for batch, truth in zip(_batches(inputs), _batches(targets), strict=True):
        step = task.step((preprocessing(batch.clone()), truth), "test")
        for metric in metrics.values():
            metric.update(step.outputs, step.targets)
    # Through np.float32, a value is printed with the digits of float32: 0.9, not
    # 0.8999999762.
    return {name: float(str(np.float32(metric.compute()))) for name, metric in metrics.items()}


def _batches(samples: Tensor) -> tuple[Tensor, ...]:
    """Split samples into batches of 1, 7, and then 256."""
    return samples.tensor_split([1, *range(8, len(samples), 256)])
