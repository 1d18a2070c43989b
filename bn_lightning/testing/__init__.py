"""Tests that projects inherit: of normalization layers, of data, and of tasks."""

from bn_lightning.testing.data import DataTests as DataTests
from bn_lightning.testing.norms import norm_checks as norm_checks
from bn_lightning.testing.tasks import TaskTests as TaskTests
