"""`TaskTests` for the tasks of this repository. test_task_mutants.py has broken ones."""

import pytest

from bn_lightning.testing import TaskTests
from bn_lightning.testing.tasks.task_tests import NetworkTests

SAMPLE = ("--data.source", "sample", "--data.batch_size", "32")


class TestLeNetHere(NetworkTests):
    """Those of the tests that start no process."""

    experiment = "bn_lightning.experiment:EXPERIMENT"
    settings = SAMPLE


class TestRegressionHere(NetworkTests):
    experiment = "friedman.experiment:EXPERIMENT"


@pytest.mark.slow
class TestLeNet(TaskTests):
    experiment = "bn_lightning.experiment:EXPERIMENT"
    settings = SAMPLE


@pytest.mark.slow
class TestResNet(TaskTests):
    experiment = "bn_lightning.experiment:EXPERIMENT"
    settings = (
        *SAMPLE,
        *("--model.network", "resnet", "--model.network_args.depth", "8"),
        *("--model.network_args.width", "8", "--model.lr", "0.05"),
    )
