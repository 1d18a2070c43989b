"""Tests of the task of a project, and the training and the runs that they compare."""
