"""Tests that projects inherit: of normalization layers, of data, and of tasks."""

from typing import TYPE_CHECKING, Any

from bn_lightning import lazy

if TYPE_CHECKING:
    from bn_lightning.testing.data.data_tests import DataTests as DataTests
    from bn_lightning.testing.norms import norm_checks as norm_checks
    from bn_lightning.testing.tasks.task_tests import TaskTests as TaskTests

# Modules are imported on first use, so that tests of a norm do not import Lightning.
_MODULES = {
    "DataTests": "data.data_tests",
    "TaskTests": "tasks.task_tests",
    "norm_checks": "norms",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    return lazy.load(__name__, _MODULES, name)
