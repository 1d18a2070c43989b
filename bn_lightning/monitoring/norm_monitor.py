"""A callback that logs statistics of norm layers, activations and gradients."""

import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from bn_lightning.errors import UserError, report_failure
from bn_lightning.monitoring import dashboard
from bn_lightning.monitoring.measurements import (
    MAX_LAYERS,
    Measurements,
    is_activation,
    population_lag,
    selection,
    short_name,
)
from bn_lightning.norms import recognition
from bn_lightning.training import precise_statistics
from bn_lightning.training.precise_statistics import PreciseStatistics
from bn_lightning.training.task import Task

# Histograms are written in every second monitored step: a histogram takes as long as
# five scalars.
MONITORED_STEPS_PER_HISTOGRAM = 2


class NormMonitor(pl.Callback):
    """Logs statistics of a network's norm layers: `Trainer(callbacks=[NormMonitor()])`.

    Norm layers are recognized by their parameters and buffers, not by their class (see
    `recognition.layers`). Activations are the modules of `torch.nn.modules.activation`,
    numbered in execution order. Hooks are registered only for monitored steps. With
    several processes, rank 0's shard of the batch is monitored.

    A large network is monitored in part: at most `max_layers` norm layers, activations,
    and other layers with parameters, evenly spaced, with the first and the last. The
    console and TensorBoard (under Text) state which.

    LAYER is the name of a layer in the network. Values are those of the first forward
    pass of a step, before the step changes any parameter or running statistic. Only
    `population_lag` is measured at each validation instead. The tags are:

    * `activation_input/1/p15`, `p50`, `p85`: percentiles of the input of the first activation, as
      in figure 1 (b, c) of Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167;
    * `saturated/1`: fraction of that input at which the slope of the activation is at most 5% of
      its steepest slope;
    * `channel_0/LAYER/batch_mean`, `running_mean`, `batch_var`, `running_var`, `gamma`, `beta`: the
      values of channel 0. The histograms `gamma/LAYER` and so on have all channels;
    * `running_lag/LAYER/mean`: difference of batch mean and running mean, in running standard
      deviations; `running_lag/LAYER/var`: log2(batch variance / running variance). Both
      are root mean squares over the channels;
    * `population_lag/LAYER/mean`, `population_lag/LAYER/var`: the same, with the statistics of the
      population in place of those of one batch. They are those that `PreciseStatistics`
      estimates from many batches at the current weights, or at the averaged weights with
      weight averaging. Without this callback, there is no such tag;
    * `gradient_norm/LAYER`, and `gradient_norm/all` of all parameters;
    * `steps_per_second`.

    TensorBoard shows them as charts under Custom Scalars.

    Args:
        every_n_steps: monitor every n-th optimizer step. With the default, monitoring
            takes about 1% of the time of a small network, and less of a large one.
        max_layers: number of layers of each kind that are monitored at most.

    Raises:
        UserError: every_n_steps is below 1, or max_layers is below 2.
    """

    def __init__(self, every_n_steps: int = 100, max_layers: int = MAX_LAYERS) -> None:
        if every_n_steps < 1:
            raise UserError(
                f"every_n_steps is {every_n_steps}; it must be at least 1, for example "
                "NormMonitor(every_n_steps=100)."
            )
        if max_layers < 2:
            raise UserError(
                f"max_layers is {max_layers}; it must be at least 2, for example "
                "NormMonitor(max_layers=20)."
            )
        self.every_n_steps = every_n_steps
        self.max_layers = max_layers
        # The registered hooks; empty except during the forward pass of a monitored
        # step.
        self._hooks = ExitStack()
        self._reset()

    def _reset(self) -> None:
        self._measurements = Measurements(self.max_layers)
        self._step = -1  # the last monitored step
        self._clock: tuple[int, float] | None = None  # step and time of the last speed measurement
        self._is_measuring = False
        self._has_layout = False
        self._has_text = False
        self._has_failed = False

    def _observe(self, measure: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Call a function that measures or logs. After its first exception, nothing is monitored.

        Some layers and devices do not support a measurement. This must not end the run.
        """
        if self._has_failed:
            return
        self._has_failed = True
        with report_failure("Norm layers are not monitored in the rest of this run"):
            measure(*args, **kwargs)
            self._has_failed = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._reset()
        norms = [*recognition.layers(pl_module)]
        chosen = selection(norms, self.max_layers)
        if len(chosen) < len(norms) and trainer.is_global_zero and trainer.loggers:
            names = ", ".join(map(short_name, chosen))
            print(
                f"NormMonitor monitors {len(chosen)} of {len(norms)} norm layers: {names}\n"
                f"{dashboard.how_to_monitor(len(norms))}",
                flush=True,
            )

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
        if not is_due or self._has_failed or not trainer.is_global_zero or not trainer.loggers:
            return
        self._step, self._is_measuring = step, True
        is_histogram_due = step % (self.every_n_steps * MONITORED_STEPS_PER_HISTOGRAM) == 0
        norms = [*recognition.layers(pl_module)]
        self._measurements.begin_step(is_histogram_due, norms)
        self._measure_speed(step)
        self._register_hooks(pl_module, selection(norms, self.max_layers))

    def _measure_speed(self, step: int) -> None:
        assert self._clock is not None
        last_step, last_time = self._clock
        now = time.perf_counter()
        self._clock = step, now
        if step > last_step:
            speed = (step - last_step) / (now - last_time)
            self._measurements.scalars["steps_per_second"] = speed

    def _register_hooks(self, pl_module: pl.LightningModule, norms: Collection[str]) -> None:
        # A monitored step runs uncompiled. Otherwise torch.compile would also compile
        # the hooks.
        self._hooks.enter_context(torch.compiler.set_stance("force_eager"))
        for name, module in pl_module.named_modules():
            hook: Callable[..., None]
            if name in norms:
                hook = partial(self._observe, self._measurements.measure_norm, short_name(name))
            elif is_activation(module):
                hook = partial(self._observe, self._measurements.keep_activation_input)
            else:
                continue
            self._hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        # With activation checkpointing, the backward pass repeats the forward pass. The
        # hooks must not run again.
        self._hooks.close()
        if self._is_measuring:
            self._observe(self._measurements.measure_activations)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._is_measuring:
            self._observe(self._measurements.measure_gradients, pl_module, optimizer)

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
        # With gradient accumulation, the gradients are measured in the last batch of a
        # step.
        self._is_measuring = not self._measurements.has_gradients
        self._observe(self._log, trainer, pl_module)

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        scalars, histograms = self._measurements.take()
        for logger in trainer.loggers:
            logger.log_metrics(scalars, self._step)
        for writer in dashboard.writers(trainer):
            dashboard.add_histograms(writer, histograms, self._step)
            if not self._has_layout:
                metrics = pl_module.metric_names[1:] if isinstance(pl_module, Task) else ()
                is_precise = precise_statistics.is_used(trainer)
                writer.add_custom_scalars(dashboard.layout(metrics, scalars, is_precise))
        self._has_layout = True
        if not self._is_measuring and not self._has_text:
            self._write_selection(trainer, pl_module)

    def _write_selection(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write to TensorBoard which layers are monitored, unless all are."""
        self._has_text = True
        measured = self._measurements
        name_of = {module: short_name(name) for name, module in pl_module.named_modules()}
        activations = [
            f"{number} ({name_of[activation]})"
            for number, activation in enumerate(measured.activations, 1)
        ]
        layers = {
            "norm layers": [short_name(name) for name in measured.norms],
            "activations": activations,
            "other layers": [short_name(name) for name in measured.other_layers],
        }
        if any(len(names) > self.max_layers for names in layers.values()):
            for writer in dashboard.writers(trainer):
                text = dashboard.selection_table(layers, self.max_layers)
                writer.add_text("monitored_layers", text, self._step)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero or not trainer.loggers:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, PreciseStatistics) and callback.is_validating:
                self._observe(self._log_population_lag, trainer, pl_module, callback)

    def _log_population_lag(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, precise: PreciseStatistics
    ) -> None:
        norms = selection([*recognition.layers(pl_module)], self.max_layers)
        scalars = population_lag(precise.running, precise.estimated, norms)
        for logger in trainer.loggers if scalars else ():
            logger.log_metrics(scalars, trainer.global_step)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # If a callback has ended the epoch within a step, the hooks are still
        # registered.
        self._hooks.close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._hooks.close()
