"""Conformance tests for normalization layers: the command `check`."""
