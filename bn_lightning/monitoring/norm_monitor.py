"""A callback that logs what norm layers, activations and gradients do during training."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from bn_lightning.errors import UserError
from bn_lightning.monitoring import dashboard
from bn_lightning.monitoring.measurements import Measurements, is_activation, short_name
from bn_lightning.norms import recognition
from bn_lightning.training.task import Task

# Histograms are written every second time, since one takes as long as five scalars.
STEPS_PER_HISTOGRAM = 2


class NormMonitor(pl.Callback):
    """Logs statistics of a network's norm layers: `Trainer(callbacks=[NormMonitor()])`.

    Norm layers are recognized by their parameters and buffers, not by their class (see
    `recognition.layers`). Activations are the modules of `torch.nn.modules.activation`, numbered in
    execution order. Hooks are registered only for monitored steps. With several processes, rank 0's
    shard of the batch is monitored.

    These are the tags. LAYER is a name in the network, and values are those of a step's first
    forward pass, before the step has changed anything:

    * `activation_input/1/p15`, `p50`, `p85`: percentiles of the input of the first activation, as
      in figure 1 (b, c) of Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167;
    * `saturated/1`: the share of that input where the activation is flat: its slope is a twentieth
      of its steepest slope, or less;
    * `channel_0/LAYER/batch_mean`, `running_mean`, `batch_var`, `running_var`, `gamma`, `beta`: the
      values of one channel. All channels are under the same names in the histograms;
    * `running_lag/LAYER/mean`: the difference of batch mean and running mean in running deviations,
      and `running_lag/LAYER/var`: log2(batch variance / running variance). Both are root mean
      squares over the channels;
    * `gradient_norm/LAYER`, and of all parameters `gradient_norm/all`; `steps_per_second`.

    In TensorBoard they are arranged as charts under Custom Scalars.

    Args:
        every_n_steps: monitor every n-th optimizer step.

    Raises:
        UserError: a number below 1.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        if every_n_steps < 1:
            raise UserError(
                f"every_n_steps is {every_n_steps}; it must be at least 1: "
                "NormMonitor(every_n_steps=100)"
            )
        self.every_n_steps = every_n_steps
        self._hooks = ExitStack()  # empty except in the forward pass of a monitored step
        self._begin()

    def _begin(self) -> None:
        self._measurements = Measurements()
        self._step = -1  # the last one that was monitored
        self._clock: tuple[int, float] | None = None  # step and time since when speed is measured
        self._is_measuring = False
        self._is_laid_out = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._clock = None

    on_validation_start = on_train_epoch_start

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self._clock is None:
            self._clock = step, time.perf_counter()
        is_due = step % self.every_n_steps == 0 and step != self._step
        if not is_due or not trainer.is_global_zero or not trainer.loggers:
            return
        self._step, self._is_measuring = step, True
        is_histogram_due = step % (self.every_n_steps * STEPS_PER_HISTOGRAM) == 0
        self._measurements.begin_step(is_histogram_due)
        self._measure_speed(step)
        self._register_hooks(pl_module)

    def _measure_speed(self, step: int) -> None:
        assert self._clock is not None
        before, then = self._clock
        now = time.perf_counter()
        self._clock = step, now
        if step > before:
            self._measurements.scalars["steps_per_second"] = (step - before) / (now - then)

    def _register_hooks(self, pl_module: pl.LightningModule) -> None:
        # Otherwise torch.compile would compile the hooks too.
        self._hooks.enter_context(torch.compiler.set_stance("force_eager"))
        norms = recognition.layers(pl_module)
        for name, module in pl_module.named_modules():
            hook: Callable[..., None]
            if name in norms:
                hook = partial(self._measurements.measure_norm, short_name(name))
            elif is_activation(module):
                hook = self._measurements.keep_activation_input
            else:
                continue
            self._hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        # From here on a checkpointed forward pass is repeated.
        self._hooks.close()
        self._measurements.measure_activations()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._is_measuring:
            self._measurements.measure_gradients(pl_module, optimizer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not self._is_measuring:
            return
        self._hooks.close()
        # The gradients of a step that takes several batches come with its last batch.
        self._is_measuring = not self._measurements.has_gradients
        scalars, histograms = self._measurements.take()
        for logger in trainer.loggers:
            logger.log_metrics(scalars, self._step)
        for writer in dashboard.writers(trainer):
            dashboard.add_histograms(writer, histograms, self._step)
            if not self._is_laid_out:
                metrics = pl_module.metric_names[1:] if isinstance(pl_module, Task) else ()
                writer.add_custom_scalars(dashboard.layout(metrics, scalars))
        self._is_laid_out = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A callback can skip the rest of an epoch.
        self._hooks.close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._hooks.close()
