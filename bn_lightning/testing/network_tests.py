"""Tests of single steps: training on one batch, evaluation, checkpoints and precision."""

import copy
import logging
import math
from typing import ClassVar

import pytest
import torch

from bn_lightning.testing import batches, fitting, outcomes, steps, trained
from bn_lightning.testing.experiments import ExperimentTests
from bn_lightning.testing.failures import describe, fail, listed
from bn_lightning.testing.fitting import Fitted
from bn_lightning.testing.task_runs import Runs
from bn_lightning.training.task import Stage

# Metrics are sums in float32. A mean of batch means differs by a percent or more.
METRICS = (1e-4, 1e-6)
# Two batch sizes may be computed by different kernels.
OUTPUTS = (1e-4, 1e-5)
# Allowed rounding in bfloat16: steps at the largest value, and multiples of the change that
# rounding only the weights and the input causes.
BFLOAT16_STEPS, BFLOAT16_CHANGES = 4, 8
# Lightning uses names that torch and jsonargparse have deprecated, and warns about arguments
# that are not those of the command line.
WARNINGS = (
    "ignore:LightningCLI's args parameter",
    "ignore:.*isinstance.treespec, LeafSpec",
    "ignore:(?s).*instantiate_classes",
    "ignore:(?s).*JsonargparseDeprecationWarning",
)


class NetworkTests(ExperimentTests):
    """The tests of `TaskTests` that run in the process of pytest."""

    pytestmark: ClassVar[list[pytest.MarkDecorator]] = [
        pytest.mark.filterwarnings(warning) for warning in WARNINGS
    ]
    overfits_to: ClassVar[float] = 0.5
    _runs: ClassVar[tuple[type, Runs] | None] = None

    @pytest.fixture
    def runs(
        self, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
    ) -> Runs:
        """Return the runs that the tests of this class share."""
        # Otherwise each failure also shows what Lightning has logged.
        for name in ("lightning.pytorch", "lightning.fabric"):
            caplog.set_level(logging.WARNING, name)
        cls = type(self)
        if cls._runs is None or cls._runs[0] is not cls:
            cls._runs = cls, Runs(cls, tmp_path_factory.mktemp("runs"), cls.overfits_to)
        return cls._runs[1]

    @pytest.fixture
    def fitted(self, runs: Runs) -> Fitted:
        """Return the task that was trained on one batch."""
        return trained.fitted_of(runs)

    # Training

    def test_one_batch_can_be_overfitted(self, runs: Runs) -> None:
        fitted = trained.fitted_of(runs)
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
        without = sorted(fitted.watch.without_gradient)
        if without:
            fail(
                f"No gradient reaches {len(without)} parameter(s) in "
                f"{len(fitted.watch.losses)} steps:\n{listed(without)}",
                "detach(), torch.no_grad(), .data and NumPy between these parameters and the "
                "loss, and layers that forward() does not use. Freeze parameters on purpose with "
                "requires_grad_(False).",
            )

    def test_the_optimizer_has_every_parameter(self, fitted: Fitted) -> None:
        left_out = fitted.watch.left_out
        if left_out:
            fail(
                f"No optimizer has {len(left_out)} parameter(s), so they are never trained:\n"
                f"{listed(left_out)}",
                "configure_optimizers(). Freeze parameters on purpose with requires_grad_(False).",
            )

    # Evaluation

    @pytest.mark.parametrize("stage", ["val", "test"])
    def test_metrics_equal_those_of_all_samples_at_once(self, fitted: Fitted, stage: Stage) -> None:
        batch = trained.evaluation_batch(fitted, stage)
        parts = batches.unequal_parts(batch)
        logged = trained.evaluate(fitted, stage, parts)
        # Values that the task logs by itself are compared with those of one batch.
        at_once = trained.evaluate(fitted, stage, [batch])
        at_once |= steps.metrics_at_once(fitted, stage, batch)
        wrong = list(outcomes.differences(at_once, logged, *METRICS))
        if wrong:
            sizes = ", ".join(str(batches.count(part)) for part in parts)
            fail(
                f"Metrics of {batches.count(batch)} samples depend on the batches, here of {sizes}"
                f" (the value of all samples at once, and the logged one):\n"
                f"{listed(wrong)}",
                "a mean of the means of batches (a metric keeps a sum and a count; self.log() "
                "needs batch_size), a loss that is a sum instead of a mean, a metric without "
                "reset(), and outputs that depend on the other samples of the batch.",
            )

    def test_metrics_start_anew_in_each_evaluation(self, fitted: Fitted) -> None:
        batch = trained.evaluation_batch(fitted, "val")
        half = batches.part(batch, 0, batches.count(batch) // 2)
        trained.evaluate(fitted, "val", [batch])
        logged = trained.evaluate(fitted, "val", [half])
        expected = steps.metrics_at_once(fitted, "val", half)
        common = {name: logged[name] for name in expected}
        wrong = list(outcomes.differences(expected, common, *METRICS))
        if wrong:
            fail(
                "After an evaluation of other samples, metrics have other values (the value of a "
                f"new metric, and the logged one):\n{listed(wrong)}",
                "reset() of these metrics, which must set sums and counts to 0. States of "
                "torchmetrics' add_state() are reset without code.",
            )

    def test_an_evaluation_leaves_the_network_unchanged(self, fitted: Fitted) -> None:
        batch = trained.evaluation_batch(fitted, "val")
        before = copy.deepcopy(fitted.task.network.state_dict())
        trained.evaluate(fitted, "val", batches.unequal_parts(batch))
        changed = list(outcomes.differences(before, fitted.task.network.state_dict()))
        if changed:
            fail(
                f"A validation changes the network:\n{listed(changed)}",
                "forward() of these layers: state may change only `if self.training`.",
            )

    def test_the_output_of_a_sample_does_not_depend_on_its_batch(self, fitted: Fitted) -> None:
        size = batches.count(fitted.batch)
        whole = trained.outputs(fitted, fitted.batch)
        for start, stop in ((0, 1), (1, 3), (size // 2, size)):
            alone = trained.outputs(fitted, batches.part(fitted.batch, start, stop))
            found = outcomes.differences(whole[start:stop], alone, *OUTPUTS, "the output")
            wrong = list(found)
            if wrong:
                fail(
                    f"In eval mode, {stop - start} sample(s) alone have other outputs than in a "
                    f"batch of {size}:\n{listed(wrong)}",
                    "layers that use statistics of the batch or random numbers in eval mode "
                    "(F.dropout needs training=self.training), operations over dimension 0, and "
                    "squeeze(), which removes the dimension of the batch if it has one sample.",
                )

    def test_the_network_leaves_its_input_unchanged(self, fitted: Fitted) -> None:
        batch = copy.deepcopy(fitted.batch)
        fitted.task.eval()
        with torch.no_grad():
            fitted.task.step(batch, "val")
        before, after = batches.tensors_in(fitted.batch), batches.tensors_in(batch)
        if list(outcomes.differences(before, after)):
            fail(
                "step() changes the batch that it is given, so a second use of the same samples "
                "has another result.",
                "operations in place at the start of the network: `x += ...`, methods whose name "
                "ends with an underscore, and nn.ReLU(inplace=True).",
            )

    # Checkpoints and precision

    def test_settings_in_a_checkpoint_are_plain_data(self, fitted: Fitted) -> None:
        settings = {**fitted.task.hparams, **fitted.data.hparams}
        objects = [
            f"{name} is a {type(value).__module__}.{type(value).__qualname__}"
            for name, value in settings.items()
            if not steps.is_plain(value)
        ]
        if objects:
            fail(
                "Settings are not plain data, so checkpoints cannot be loaded safely:\n"
                f"{listed(objects)}",
                "the arguments of the task, and save_hyperparameters(). Use numbers, texts, lists "
                "and dicts, and build objects from them.",
            )

    def test_a_checkpoint_restores_the_network(self, fitted: Fitted) -> None:
        task = trained.restore(fitted).task
        found = fitting.outputs_of(task, fitted.batch)
        wrong = list(outcomes.differences(fitted.outputs, found, where="the output"))
        if wrong:
            fail(
                "A network that is restored from a checkpoint has other outputs in eval mode than "
                f"the trained one:\n{listed(wrong)}",
                "state that is not in the checkpoint, random numbers in eval mode, and methods "
                f"that rename or skip weights.{trained.candidates(fitted.task, task)}",
            )

    def test_a_step_in_bfloat16_is_near_that_in_float32(self, fitted: Fitted) -> None:
        task, batch = trained.restore(fitted).task.requires_grad_(True), fitted.batch
        # The masks of dropout differ between the precisions.
        stage: Stage = "val" if steps.is_random(task, batch) else "train"
        precise = steps.training_step(task, batch, stage)
        where = (
            "tensors with a fixed dtype, conversions to float16, and exponentials or sums of large "
            "values, which need x.float()."
        )
        try:
            with torch.autocast("cpu", torch.bfloat16):
                found = steps.training_step(task, batch, stage)
        except Exception as error:
            fail(f"A step with --trainer.precision bf16-mixed fails: {describe(error)}", where)
        task.load_state_dict(steps.round_to_bfloat16(dict(task.state_dict())))
        changed = steps.training_step(task, steps.round_to_bfloat16(batch), stage)
        wrong = []
        for name in ("loss", "outputs"):
            tensors = [getattr(it, name).detach().float() for it in (precise, found, changed)]
            expected, largest = tensors[0], float(tensors[0].abs().max())
            if not all(bool(it.isfinite().all()) for it in tensors):
                wrong.append(f"{name}: NaN or infinite")
                continue
            off, change = (float((it - expected).abs().max()) for it in tensors[1:])
            rounding = BFLOAT16_STEPS * torch.finfo(torch.bfloat16).eps * largest
            allowed = max(rounding, BFLOAT16_CHANGES * change)
            if off > allowed:
                wrong.append(f"{name}: the difference is up to {off:.2g} (allowed: {allowed:.2g})")
        if wrong:
            fail(
                "A step with --trainer.precision bf16-mixed is far from that in float32:\n"
                f"{listed(wrong)}",
                where,
            )
