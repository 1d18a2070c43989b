"""Lightning's loops: every private name and every piece of loop state that this project relies on.

Verified with lightning 2.6.6. Where an upgrade breaks exact resume, this is the file to look at.
"""

from typing import Any

import lightning.pytorch as pl


def first_batch(trainer: pl.Trainer) -> int:
    """Return the batch at which the current epoch starts; above 0 where a resumed run is in it."""
    return batches_done(trainer) if trainer.fit_loop.restarting else 0


def batches_done(trainer: pl.Trainer) -> int:
    """Return how many batches of the current epoch were trained on."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)


def is_last_batch(trainer: pl.Trainer) -> bool:
    """Return whether the batch that is trained on ends its epoch."""
    return bool(trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)


def batches_that_stepped(checkpoint: dict[str, Any]) -> int:
    """Return Lightning's count of optimizer steps for loggers."""
    state = checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]
    return int(state["_batches_that_stepped"])


def write_position(checkpoint: dict[str, Any], epoch: int, batch: int) -> None:
    """Make a checkpoint resume at the start of a batch.

    The loops are set as if the epoch were about to begin with some batches done. Then Lightning
    calls `on_train_epoch_start`, which prepares state that no checkpoint has (the schedule of
    StochasticWeightAveraging), and takes the next batch.
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
    """Set ready, started, processed and completed to the same number: nothing is in progress."""
    for name, value in (("total", total), ("current", current)):
        progress[name] = dict.fromkeys(progress[name], value)


def end_restart(trainer: pl.Trainer, batches_that_stepped: int) -> None:
    """Leave the state of a restart, in the first batch of a resumed run."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = batches_that_stepped
    # Otherwise Lightning skips the schedulers at the end of this epoch.
    # The public setter `restarting` has no effect here, so the private attribute is set.
    trainer.fit_loop._restarting = False


def cluster_environment(trainer: pl.Trainer) -> Any:
    """Return the cluster environment that Lightning's own signal handlers use."""
    return trainer._accelerator_connector.cluster_environment


def disable_sigterm_broadcast(trainer: pl.Trainer) -> None:
    """Stop Lightning from asking rank 0 after every step whether it has received SIGTERM."""
    loop = trainer.fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
