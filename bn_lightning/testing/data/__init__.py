"""Tests of the data of a project, and the passes over its loaders that they compare."""
