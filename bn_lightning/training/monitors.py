"""Refusal of schedulers and callbacks that monitor a metric which the run does not have.

Whatever monitors a metric selects by it: ReduceLROnPlateau, EarlyStopping, ModelCheckpoint.
Nothing may select by metrics of the test set, so these are refused too.
"""

from collections.abc import Collection, Iterable
from typing import Any

import lightning.pytorch as pl

from bn_lightning.errors import UserError

ALTERNATIVE = "monitor a metric of the training, such as train_loss_epoch"


def refuse(trainer: pl.Trainer, declared: Collection[str], sanity_check: Collection[str]) -> None:
    """Refuse a monitor of a metric that this run does not have. Training has not started.

    Args:
        declared: names of the validation metrics that the task declares.
        sanity_check: names of all metrics that the sanity check of validation has logged;
            empty if there was none.

    Raises:
        UserError: a monitor is not usable.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    found = [*_of_schedulers(trainer), *of_callbacks(callbacks)]
    logged = {*declared, *sanity_check}
    on_test_set = getattr(data, "validates_on_test_set", False)
    refuse_unusable(found, logged, validates=trainer.enable_validation, on_test_set=on_test_set)
    for name, metric in found:
        # Without a sanity check, it is not known what else validation logs.
        if sanity_check and is_of_validation(metric) and metric not in logged:
            raise UserError(
                f"{name} monitors {metric}, but validation logs {', '.join(sorted(logged))}.\n"
                "Choose one of these."
            )


def is_of_validation(metric: str, logged: Collection[str] = ()) -> bool:
    """Return whether validation computes a metric, by its name or because it logs it."""
    return metric in logged or metric.startswith("val_")


def of_callbacks(callbacks: Iterable[Any]) -> list[tuple[str, str]]:
    """Return the class names of callbacks that monitor a metric, each with its name."""
    found = [
        (type(callback).__name__, getattr(callback, "monitor", None)) for callback in callbacks
    ]
    return [(name, metric) for name, metric in found if isinstance(metric, str)]


def _of_schedulers(trainer: pl.Trainer) -> list[tuple[str, str]]:
    return [
        (type(config.scheduler).__name__, config.monitor)
        for config in trainer.lr_scheduler_configs
        if config.reduce_on_plateau and config.monitor is not None
    ]


def refuse_unusable(
    monitors: Iterable[tuple[str, str]],
    logged: Collection[str],
    *,
    validates: bool,
    on_test_set: bool,
) -> None:
    """Refuse monitors of validation metrics if there are none, or if they are test metrics.

    Args:
        monitors: class names, each with the metric that it monitors.
        logged: names of metrics that validation is known to log.
        validates: whether the run validates.
        on_test_set: whether validation uses the test set.

    Raises:
        UserError: a monitor is not usable.
    """
    for name, metric in monitors:
        if not is_of_validation(metric, logged):
            continue
        if not validates:
            raise UserError(
                f"{name} monitors {metric}, but this run has no validation.\n"
                f"Remove --trainer.limit_val_batches 0, or {ALTERNATIVE}."
            )
        if on_test_set:
            raise UserError(
                f"{name} monitors {metric}, which is computed on the test set, because there are "
                "no validation samples. Nothing may be selected by results on the test set.\n"
                f"Hold out validation samples, or {ALTERNATIVE}."
            )
