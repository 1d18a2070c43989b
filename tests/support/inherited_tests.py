"""Run the tests of a class that projects inherit, and return the failures."""

import inspect

import pytest

from bn_lightning.testing import TaskTests
from bn_lightning.testing.tasks.runs import Runs

# Tests that start processes or export.
LONG = ("killed", "reproduce", "processes", "leaves_its_results", "exported")


class Inherited:
    """The tests of an experiment, which can be run one by one.

    Args:
        experiment: the import path of the experiment.
        folder: an empty folder for the runs.
    """

    def __init__(self, experiment, folder):
        self.tests = type("Inherited", (TaskTests,), {"experiment": experiment})
        self.runs = Runs(self.tests, folder, self.tests.overfits_to)

    def quick_failures(self):
        """Return the messages of all tests that fail in this process, by name of the test."""
        names = [name for name in dir(self.tests) if name.startswith("test_")]
        quick = [name for name in names if not any(word in name for word in LONG)]
        found = {name: self.failure(name) for name in quick}
        return {name: message for name, message in found.items() if message is not None}

    def failure(self, name, **values):
        """Return the message of a test that fails, and None if it passes."""
        test = getattr(self.tests(), name)
        wanted = inspect.signature(test).parameters
        arguments = {"runs": self.runs, "stage": "val"} | values
        try:
            if "fitted" in wanted:
                arguments["fitted"] = self.runs.fitted
            test(**{key: value for key, value in arguments.items() if key in wanted})
        except pytest.fail.Exception as failure:
            return str(failure)
        return None
