"""Callbacks that observe training without changing it, and the figures they draw."""
