"""Conformance checks for normalization layers: the command `check`."""
