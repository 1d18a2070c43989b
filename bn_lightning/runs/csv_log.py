"""Continuation of the metrics.csv of a resumed run. Lightning's CSVLogger would delete it."""

import csv
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger


def keep_rows(loggers: Iterable[Logger], before_step: int) -> None:
    """Keep the rows that were logged before a step. The resumed run logs the others again."""
    for logger in loggers:
        if isinstance(logger, CSVLogger) and Path(logger.log_dir, "metrics.csv").is_file():
            _keep_rows(logger, before_step)


def _keep_rows(logger: CSVLogger, before_step: int) -> None:
    with Path(logger.log_dir, "metrics.csv").open(newline="", encoding="utf-8") as content:
        rows: list[Any] = [row for row in csv.DictReader(content) if int(row["step"]) < before_step]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Experiment logs directory .* exists")
        # This deletes the file.
        writer = logger.experiment
    writer.metrics = rows
    writer.save()
