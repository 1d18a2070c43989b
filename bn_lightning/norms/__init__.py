"""Normalization layers, and what finds, replaces and synchronizes them in any network."""
