"""Tests that projects inherit: of normalization layers, and of the task of an experiment."""

from bn_lightning.testing.norms import norm_checks as norm_checks
from bn_lightning.testing.tasks import TaskTests as TaskTests
