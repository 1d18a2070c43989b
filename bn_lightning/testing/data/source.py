"""The data module of an experiment, constructed as often as needed."""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from bn_lightning.runs import experiment as experiments
from bn_lightning.testing.experiments import ExperimentTests
from bn_lightning.training.data_module import DataModule


@dataclass(frozen=True)
class Source:
    """The data module of an experiment, and what constructs it.

    Attributes:
        experiment, settings: see `ExperimentTests`.
        cwd: the current folder.
        arguments: arguments of the data module, without those that are found in data.
        options: arguments of the Trainer that change loaders.
    """

    experiment: str
    settings: tuple[str, ...]
    cwd: str
    arguments: dict[str, Any] = field(compare=False, repr=False)
    options: dict[str, Any] = field(compare=False, repr=False)

    def build(self) -> DataModule:
        """Construct the data module as `export` and `predict` do."""
        return experiments.load(self.experiment).data(**copy.deepcopy(self.arguments))


@cache
def source_of(tests: type[ExperimentTests], cwd: str) -> Source:
    """Return the source that a class of tests uses in a folder, which is the current one."""
    with quiet():
        cli = tests.build("--trainer.devices", "1")
    data, trainer = cli.datamodule, cli.config.fit.trainer
    arguments = {n: value for n, value in data.hparams.items() if n not in data.found_in_data}
    names = ("use_distributed_sampler", "reload_dataloaders_every_n_epochs")
    options = {name: trainer[name] for name in names}
    return Source(tests.experiment, tuple(tests.settings), cwd, arguments, options)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide Lightning's messages and all warnings, and compute with one thread.

    Batches are small, and worker processes may be forked.
    """
    loggers = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")]
    levels, threads = [logger.level for logger in loggers], torch.get_num_threads()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        torch.set_num_threads(threads)
