"""metrics.csv of a resumed run."""

import csv
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger

from bn_lightning.runs import csv_log


def read(logger):
    logger.save()
    with Path(logger.log_dir, "metrics.csv").open(newline="") as file:
        return [(int(row["step"]), row["loss"], row["acc"]) for row in csv.DictReader(file)]


def test_rows_before_the_step_are_kept_and_the_others_logged_again(tmp_path):
    first = CSVLogger(tmp_path, name="a", version=0)
    csv_log.keep_rows([first], 0)  # there is no file yet
    for step in (0, 9, 19):
        first.log_metrics({"loss": step / 10}, step)
    first.log_metrics({"acc": 0.5}, 21)
    before = read(first)
    resumed = CSVLogger(tmp_path, name="a", version=0)
    csv_log.keep_rows([resumed], 19)
    resumed.log_metrics({"loss": 1.9}, 19)
    resumed.log_metrics({"acc": 0.5}, 21)
    assert read(resumed) == before
