"""Normalization layers, and functions that recognize, convert and synchronize them."""
