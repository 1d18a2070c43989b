"""Callbacks that observe training without changing it, and the pictures they draw."""
