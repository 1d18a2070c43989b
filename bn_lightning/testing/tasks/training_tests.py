"""Tests of the loss, the gradients and the optimizer in training on one batch."""

import math

import pytest

from bn_lightning.testing import batches
from bn_lightning.testing.failures import fail, fail_if
from bn_lightning.testing.tasks.base import FittedTests
from bn_lightning.testing.tasks.fitted import Fitted
from bn_lightning.testing.tasks.runs import Runs


class TrainingTests(FittedTests):
    """One batch can be overfitted, with all parameters."""

    def test_one_batch_can_be_overfitted(self, runs: Runs) -> None:
        fitted = runs.fitted
        watch, size = fitted.watch, batches.count(fitted.batch)
        if not watch.losses:
            pytest.skip("training_step() returns no loss.")
        if not math.isfinite(watch.losses[0]):
            fail(
                f"The loss of {size} samples is {watch.losses[0]} in the first step.",
                "overflow (conversions to float16, exponentials), logarithms and divisions by 0, "
                "and the values of the samples.",
            )
        if not watch.has_fallen:
            fail(
                f"The network does not learn one batch of {size} samples: its loss is "
                f"{watch.losses[0]:.4g} at first and {watch.losses[-1]:.4g} after "
                f"{len(watch.losses)} steps. It should fall to {watch.target:.4g}.\n"
                f"Tried: {', '.join(fitted.tried)}.",
                "the loss in step() (is there a softmax before a cross-entropy?), the labels, "
                "and the optimizer. If the loss cannot fall so far, set `overfits_to` "
                "in the test class.",
            )

    def test_every_parameter_gets_a_gradient(self, fitted: Fitted) -> None:
        without, steps = sorted(fitted.watch.without_gradient), len(fitted.watch.losses)
        fail_if(
            without,
            f"No gradient reaches {len(without)} parameter(s) in {steps} steps",
            "detach(), torch.no_grad(), .data and NumPy between these parameters and the loss, and "
            "layers that forward() does not use. Freeze parameters on purpose with "
            "requires_grad_(False).",
        )

    def test_the_optimizer_has_every_parameter(self, fitted: Fitted) -> None:
        left_out = fitted.watch.left_out
        fail_if(
            left_out,
            f"No optimizer has {len(left_out)} parameter(s), so they are never trained",
            "configure_optimizers(). Freeze parameters on purpose with requires_grad_(False).",
        )
