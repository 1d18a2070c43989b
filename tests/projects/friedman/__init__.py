"""Friedman's regression problem, learned by a multilayer perceptron."""
