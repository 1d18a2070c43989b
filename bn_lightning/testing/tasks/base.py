"""The base class of the tests of a task: its runs, and a task that is trained on one batch."""

import logging
from typing import ClassVar

import pytest

from bn_lightning.testing.experiments import ExperimentTests
from bn_lightning.testing.tasks.fitted import Fitted
from bn_lightning.testing.tasks.runs import Runs

# Lightning uses names that torch and jsonargparse have deprecated, and warns about arguments
# that are not those of the command line.
WARNINGS = (
    "ignore:LightningCLI's args parameter",
    "ignore:.*isinstance.treespec, LeafSpec",
    "ignore:(?s).*instantiate_classes",
    "ignore:(?s).*JsonargparseDeprecationWarning",
)


class FittedTests(ExperimentTests):
    """Base class of tests that share runs, and a task that is trained on one batch.

    Attributes:
        overfits_to: see `TaskTests`.
    """

    pytestmark: ClassVar[list[pytest.MarkDecorator]] = [
        pytest.mark.filterwarnings(warning) for warning in WARNINGS
    ]
    overfits_to: ClassVar[float] = 0.5
    _runs: ClassVar[Runs]

    @pytest.fixture
    def runs(
        self, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
    ) -> Runs:
        """Return the runs that the tests of this class share."""
        # Otherwise each failure also shows what Lightning has logged.
        for name in ("lightning.pytorch", "lightning.fabric"):
            caplog.set_level(logging.WARNING, name)
        cls = type(self)
        if "_runs" not in vars(cls):
            cls._runs = Runs(cls, tmp_path_factory.mktemp("runs"), cls.overfits_to)
        return cls._runs

    @pytest.fixture
    def fitted(self, runs: Runs) -> Fitted:
        """Return the task that was trained on one batch."""
        return runs.fitted
