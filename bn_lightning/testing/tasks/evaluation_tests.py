"""Tests of metrics and outputs in evaluation."""

import copy

import pytest
import torch

from bn_lightning.testing import batches
from bn_lightning.testing.failures import fail_if
from bn_lightning.testing.tasks import outcomes, steps
from bn_lightning.testing.tasks.base import FittedTests
from bn_lightning.testing.tasks.fitted import Fitted
from bn_lightning.training.task import Stage

# Metrics are sums in float32. A mean of batch means differs by a percent or more.
METRICS = (1e-4, 1e-6)
# Two batch sizes may be computed by different kernels.
OUTPUTS = (1e-4, 1e-5)


class EvaluationTests(FittedTests):
    """Metrics and outputs do not depend on batches, and an evaluation changes nothing."""

    @pytest.mark.parametrize("stage", ["val", "test"])
    def test_metrics_equal_those_of_all_samples_at_once(self, fitted: Fitted, stage: Stage) -> None:
        batch = fitted.evaluation_batch(stage)
        parts = batches.unequal_parts(batch)
        logged = fitted.evaluate(stage, parts)
        # Values that the task logs by itself are compared with those of one batch.
        at_once = fitted.evaluate(stage, [batch])
        at_once |= steps.metrics_at_once(fitted, stage, batch)
        sizes = ", ".join(str(batches.count(part)) for part in parts)
        fail_if(
            outcomes.differences(at_once, logged, *METRICS),
            f"Metrics of {batches.count(batch)} samples depend on the batches, here of {sizes} "
            "(first the value of all samples at once, then the logged one)",
            "a mean of the means of batches (a metric keeps a sum and a count; self.log() needs "
            "batch_size), a loss that is a sum instead of a mean, a metric without reset(), and "
            "outputs that depend on the other samples of the batch.",
        )

    def test_metrics_start_anew_in_each_evaluation(self, fitted: Fitted) -> None:
        batch = fitted.evaluation_batch("val")
        half = batches.part(batch, 0, batches.count(batch) // 2)
        fitted.evaluate("val", [batch])
        logged = fitted.evaluate("val", [half])
        expected = steps.metrics_at_once(fitted, "val", half)
        fail_if(
            outcomes.differences(expected, {name: logged[name] for name in expected}, *METRICS),
            "After an evaluation of other samples, metrics have other values (first the value of a "
            "new metric, then the logged one)",
            "reset() of these metrics, which must set sums and counts to 0. States of "
            "torchmetrics' add_state() are reset without code.",
        )

    def test_an_evaluation_leaves_the_network_unchanged(self, fitted: Fitted) -> None:
        batch = fitted.evaluation_batch("val")
        before = copy.deepcopy(fitted.task.network.state_dict())
        fitted.evaluate("val", batches.unequal_parts(batch))
        fail_if(
            outcomes.differences(before, fitted.task.network.state_dict()),
            "A validation changes the network",
            "forward() of these layers: state may change only `if self.training`.",
        )

    def test_the_output_of_a_sample_does_not_depend_on_its_batch(self, fitted: Fitted) -> None:
        size = batches.count(fitted.batch)
        whole = fitted.outputs_for(fitted.batch)
        for start, stop in ((0, 1), (1, 3), (size // 2, size)):
            alone = fitted.outputs_for(batches.part(fitted.batch, start, stop))
            fail_if(
                outcomes.differences(whole[start:stop], alone, *OUTPUTS, "the output"),
                f"In eval mode, {stop - start} sample(s) alone have other outputs than in a batch "
                f"of {size}",
                "layers that use statistics of the batch or random numbers in eval mode (F.dropout "
                "needs training=self.training), operations over dimension 0, and squeeze(), which "
                "removes the dimension of the batch if it has one sample.",
            )

    def test_the_network_leaves_its_input_unchanged(self, fitted: Fitted) -> None:
        batch = copy.deepcopy(fitted.batch)
        fitted.task.eval()
        with torch.no_grad():
            fitted.task.step(batch, "val")
        before, after = batches.tensors_in(fitted.batch), batches.tensors_in(batch)
        fail_if(
            outcomes.differences(before, after, where="tensor"),
            "step() changes the batch that it is given, so a second use of the same samples has "
            "another result",
            "operations in place at the start of the network: `x += ...`, methods whose name ends "
            "with an underscore, and nn.ReLU(inplace=True).",
        )
