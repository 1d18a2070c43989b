"""Tests that projects inherit: `norm_checks` for normalization layers."""

from bn_lightning.testing.norms import norm_checks as norm_checks
