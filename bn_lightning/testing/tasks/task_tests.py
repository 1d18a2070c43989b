"""Tests of the network, the loss and the metrics of an experiment, to be inherited."""

from bn_lightning.testing.tasks.checkpoint_tests import CheckpointTests
from bn_lightning.testing.tasks.evaluation_tests import EvaluationTests
from bn_lightning.testing.tasks.export_tests import ExportTests
from bn_lightning.testing.tasks.run_tests import RunTests
from bn_lightning.testing.tasks.training_tests import TrainingTests


class NetworkTests(TrainingTests, EvaluationTests, CheckpointTests):
    """Those of the tests that take seconds: they start no process."""


class TaskTests(NetworkTests, RunTests, ExportTests):
    """Tests of the task of an experiment, in pytest.

        class TestTask(TaskTests):
            experiment = "shoe_shop.experiment:EXPERIMENT"

    Short runs are made in a temporary folder, with the settings of the experiment. A test
    that does not apply is skipped, and states the reason. To leave out a test, override it:

        test_two_processes_train_as_one = None

    Attributes:
        overfits_to: the fraction of its first value to which the loss of one batch must
            fall. Label smoothing, dropout and noise need a larger one.
    """
