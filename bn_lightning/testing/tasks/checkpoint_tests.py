"""Tests of the checkpoint of a task, and of a restored task in another precision."""

import torch

from bn_lightning.testing.failures import describe, fail, fail_if, found
from bn_lightning.testing.tasks import outcomes, state, steps
from bn_lightning.testing.tasks.base import FittedTests
from bn_lightning.testing.tasks.fitted import Fitted, outputs_of
from bn_lightning.training.task import Stage

# Allowed rounding in bfloat16: steps at the largest value, and multiples of the change that
# rounding only the weights and the input causes.
BFLOAT16_STEPS, BFLOAT16_CHANGES = 4, 8


class CheckpointTests(FittedTests):
    """A checkpoint is safe, restores the network, and the network can be used in bfloat16."""

    def test_settings_in_a_checkpoint_are_plain_data(self, fitted: Fitted) -> None:
        settings = {**fitted.task.hparams, **fitted.data.hparams}
        objects = [
            f"{name} is a {type(value).__module__}.{type(value).__qualname__}"
            for name, value in settings.items()
            if not steps.is_plain(value)
        ]
        fail_if(
            objects,
            "Settings are not plain data, so checkpoints cannot be loaded safely",
            "the arguments of the task, and save_hyperparameters(). Use numbers, texts, lists and "
            "dicts, and build objects from them.",
        )

    def test_a_checkpoint_restores_the_network(self, fitted: Fitted) -> None:
        task = fitted.restore().task
        outputs = outputs_of(task, fitted.batch)
        changed = state.changed_attributes(fitted.task, task)
        fail_if(
            outcomes.differences(fitted.outputs, outputs, where="the output"),
            "A network that is restored from a checkpoint has other outputs in eval mode than the "
            "trained one",
            "state that is not in the checkpoint, random numbers in eval mode, and methods that "
            f"rename or skip weights.{found([*changed, *state.outside(fitted.task)])}",
        )

    def test_a_step_in_bfloat16_is_near_that_in_float32(self, fitted: Fitted) -> None:
        task, batch = fitted.restore().task.requires_grad_(True), fitted.batch
        # The masks of dropout differ between the precisions.
        stage: Stage = "val" if steps.is_random(task, batch) else "train"
        precise = steps.training_step(task, batch, stage)
        where = (
            "tensors with a fixed dtype, conversions to float16, and exponentials or sums of large "
            "values, which need x.float()."
        )
        try:
            with torch.autocast("cpu", torch.bfloat16):
                rounded = steps.training_step(task, batch, stage)
        except Exception as error:
            fail(f"A step with --trainer.precision bf16-mixed fails: {describe(error)}", where)
        task.load_state_dict(steps.round_to_bfloat16(dict(task.state_dict())))
        changed = steps.training_step(task, steps.round_to_bfloat16(batch), stage)
        wrong = []
        for name in ("loss", "outputs"):
            tensors = [getattr(it, name).detach().float() for it in (precise, rounded, changed)]
            expected, largest = tensors[0], float(tensors[0].abs().max())
            if not all(bool(it.isfinite().all()) for it in tensors):
                wrong.append(f"{name}: NaN or infinite")
                continue
            off, change = (float((it - expected).abs().max()) for it in tensors[1:])
            rounding = BFLOAT16_STEPS * torch.finfo(torch.bfloat16).eps * largest
            allowed = max(rounding, BFLOAT16_CHANGES * change)
            if off > allowed:
                wrong.append(f"{name}: the difference is up to {off:.2g} (allowed: {allowed:.2g})")
        what = "A step with --trainer.precision bf16-mixed is far from that in float32"
        fail_if(wrong, what, where)
