"""Tests that projects inherit: `norm_checks` for normalization layers, `DataTests` for data."""

from bn_lightning.testing.data import DataTests as DataTests
from bn_lightning.testing.norms import norm_checks as norm_checks
