"""Access to Lightning's internals: all private names and loop state that this package uses.

Verified with lightning 2.6.6. If an upgrade breaks exact resume, start here.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.logger import _flatten_dict
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from torch.optim.swa_utils import AveragedModel


def loggable(settings: dict[str, Any]) -> dict[str, Any]:
    """Return nested settings as TensorBoardLogger logs them: flat, with names such as `a/b`."""
    return TensorBoardLogger._sanitize_params(_flatten_dict(settings))


def first_batch(trainer: pl.Trainer) -> int:
    """Return the batch at which this epoch starts; above 0 if the run was resumed within it."""
    return batches_done(trainer) if trainer.fit_loop.restarting else 0


def batches_done(trainer: pl.Trainer) -> int:
    """Return the number of batches of the current epoch that have been started."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)


def is_epoch_done(trainer: pl.Trainer) -> bool:
    """Return whether all batches of the current epoch have been trained.

    A loader without a length ends its epoch with the batch that Lightning marks as last.
    """
    return batches_done(trainer) >= trainer.num_training_batches or is_last_batch(trainer)


def is_last_batch(trainer: pl.Trainer) -> bool:
    """Return whether the current batch is the last of its epoch."""
    return bool(trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)


def batches_that_stepped(checkpoint: dict[str, Any]) -> int:
    """Return Lightning's step counter for loggers."""
    state = checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]
    return int(state["_batches_that_stepped"])


def write_position(checkpoint: dict[str, Any], epoch: int, batch: int) -> None:
    """Change a checkpoint so that training resumes at the start of the given batch.

    The loop state describes an epoch that is about to start with some batches done.
    Lightning then calls `on_train_epoch_start` before the next batch.
    StochasticWeightAveraging needs that call:
    it sets up its schedule there, and no checkpoint contains that schedule.
    """
    fit_loop = checkpoint["loops"]["fit_loop"]
    _set_counters(fit_loop["epoch_progress"], total=epoch, current=epoch)
    for tracker in fit_loop["epoch_progress"].values():
        tracker["ready"] += 1
    batches = fit_loop["epoch_loop.batch_progress"]
    _set_counters(batches, total=batches["total"]["completed"], current=batch)
    batches["is_last_batch"] = False
    if batch == 0:
        _set_counters(fit_loop["epoch_loop.val_loop.batch_progress"], total=0, current=0)


def _set_counters(progress: dict[str, Any], total: int, current: int) -> None:
    """Set ready, started, processed and completed to the same number, so nothing is in progress."""
    for name, value in (("total", total), ("current", current)):
        progress[name] = dict.fromkeys(progress[name], value)


def end_restart(trainer: pl.Trainer, batches_that_stepped: int) -> None:
    """End Lightning's restart mode, in the first batch of a resumed run."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = batches_that_stepped
    # Otherwise Lightning skips the schedulers at the end of this epoch. The public
    # setter `restarting` has no effect here, so the private attribute is set.
    trainer.fit_loop._restarting = False


def check_after_validation(callback: EarlyStopping) -> None:
    """Make EarlyStopping check after each validation, unless the user has set another time.

    By default, it checks at the end of an epoch, and fails if `max_steps` ends the run in
    its first epoch, before a validation.
    """
    if callback._check_on_train_epoch_end is None:
        callback._check_on_train_epoch_end = False


def cluster_environment(trainer: pl.Trainer) -> Any:
    """Return the cluster environment that Lightning's own signal handlers use."""
    return trainer._accelerator_connector.cluster_environment


def disable_sigterm_broadcast(trainer: pl.Trainer) -> None:
    """Disable the collective that Lightning runs after each step to detect SIGTERM on rank 0."""
    loop = trainer.fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def call_before_fetches(trainer: pl.Trainer, prepare: Callable[[int], None]) -> None:
    """Call `prepare(batch_idx)` before each training batch is fetched.

    It is called with -1 before the loader's iterator is created, at the start of each
    epoch. Lightning creates the first iterator of a process earlier, at a time that
    depends on the scheduler; so it is created again, if the loader has a length. Otherwise
    a batch may have been fetched already.
    """
    fit_loop = trainer.fit_loop
    epoch_loop = fit_loop.epoch_loop

    def start_epoch(fetcher: Any) -> None:
        prepare(-1)
        is_created_below = trainer.current_epoch > 0 and not (
            fit_loop.is_resuming or epoch_loop.restarting
        )
        if fetcher.length is not None and not is_created_below:
            iter(fetcher)
        type(epoch_loop).on_run_start(epoch_loop, fetcher)

    def before_fetch() -> None:
        assert fit_loop._data_fetcher is not None
        prepare(fit_loop._data_fetcher.fetched)
        type(epoch_loop)._on_before_fetch(epoch_loop)

    epoch_loop.on_run_start = start_epoch  # type: ignore[method-assign,assignment]
    epoch_loop._on_before_fetch = before_fetch  # type: ignore[method-assign]


def restore_training_modes(trainer: pl.Trainer) -> None:
    """During a validation within `fit`, give each module the mode that it has in training."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop._module_mode.restore(trainer.lightning_module)


def wrapped_sampler(sampler: Any) -> Any:
    """Return the sampler of the user that Lightning wraps for several processes, or None."""
    return getattr(getattr(sampler, "dataset", None), "_sampler", None)


def saves_weights_after_epochs(trainer: pl.Trainer) -> bool:
    """Return whether a ModelCheckpoint saves only weights, at the end of an epoch.

    Lightning then calls no callback, so none can change this checkpoint. Runs without a
    validation do not count.
    """
    return trainer.enable_validation and any(
        callback.save_weights_only
        and callback._every_n_epochs >= 1
        and callback._should_save_on_train_epoch_end(trainer)
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint)
    )


@contextmanager
def average_in_place(averaging: WeightAveraging, pl_module: pl.LightningModule) -> Iterator[None]:
    """Swap the parameters and buffers of a module with their average, until the end."""
    average = average_model(averaging)
    assert average is not None
    before = copy.deepcopy(average.state_dict())
    averaging._swap_models(pl_module)
    try:
        yield
    finally:
        averaging._swap_models(pl_module)
        # A network of 16 bits has rounded it.
        average.load_state_dict(before)


def average_model(averaging: WeightAveraging) -> AveragedModel | None:
    """Return the average of a WeightAveraging callback; None outside of `fit`."""
    return averaging._average_model


def accumulators(trainer: pl.Trainer) -> dict[str, Any]:
    """Return the metrics in which `self.log` accumulates values over a training epoch."""
    results = trainer.fit_loop.epoch_loop._results
    return {key: it for key, it in results.items() if it.is_tensor and it.meta.on_epoch}
