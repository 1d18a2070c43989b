"""Bugs that people make: the property that is meant to find each of them fails."""

import itertools

import pytest

from bn_lightning.norms.check import processes
from bn_lightning.norms.check.examination import examine
from tests.support.planted_bases import InstanceNorm
from tests.support.planted_bugs import BUGS, NO_BUGS
from tests.support.processes import start

# What the report of a bug says.
CAUSES = {
    "grad_mode_for_training": "The mode follows torch.is_grad_enabled(). Use self.training.",
    "eval_uses_batch": "Evaluation uses the statistics of the batch.",
    "eval_uses_last_batch": "The newest batch has weight 1 in the running statistics",
    "biased_running_var": "The running variance is biased: it is divided by m instead of m - 1.",
    "unbiased_normalization": "The variance is divided by m - 1. Divide it by m",
    "inverted_momentum": "The momentum may be inverted",
    "updated_twice": "With momentum 0.05, the newest batch has weight 0.0975",
    "never_counts": "num_batches_tracked is 0 after two training steps",
    "graph_kept": "the layer keeps its graph: running_mean, running_var.",
    "beta_before_gamma": "is neither that of PyTorch's weight nor of its bias",
    "eps_outside_root": "eps is added to the standard deviation. Add it to the variance.",
    "width_missing": "The statistics are taken over height, but not over width.",
    "detached_mean": "No gradient flows through the mean.",
    "detached_var": "No gradient flows through the variance.",
    "backward_without_gamma": "The gradient of the input lacks the factor gamma.",
    "squares_minus_square": "mean(x²) - mean(x)²",
    "mean_of_means": "averages the statistics of the processes with equal weights",
    "local_running_statistics": "gradients or running statistics are those of one shard",
    "gamma_along_width": "sizes that happen to be equal hide a wrong one",
}


# Instance normalization, which needs positions.
ONLY_POSITIONS = [bug for bug, (norm, _) in BUGS.items() if issubclass(norm, InstanceNorm)]


@pytest.fixture(autouse=True)
def forked_processes(monkeypatch):
    """Fork the two processes, which is faster than spawning them as the command does."""
    monkeypatch.setattr(processes, "spawn", start)
    monkeypatch.setattr(processes, "SECONDS", 5)


# Each of them takes several seconds in two processes.
SLOW = ("empty_shard_waits", "mean_of_means")


@pytest.mark.parametrize(
    "bug", [pytest.param(bug, marks=pytest.mark.slow if bug in SLOW else ()) for bug in BUGS]
)
def test_a_bug_is_found_by_its_property_and_its_cause_is_named(bug):
    norm, name = BUGS[bug]
    num_dims = None if name == "accepts_input" else [2, 4]
    if bug in ONLY_POSITIONS:
        num_dims = [4]
    [finding] = examine(norm, names=[name], num_dims=num_dims)
    assert (finding.name, finding.verdict) in ((name, "FAIL"), (name, "DIFFERS")), finding
    assert CAUSES.get(bug, "") in finding.note


@pytest.mark.parametrize("name", NO_BUGS)
def test_a_restriction_is_no_bug(name):
    names = ["accepts_input", "normalization", "gradient_in_training", "restored_layer_continues"]
    verdicts = [finding.verdict for finding in examine(NO_BUGS[name], names=names)]
    assert verdicts == ["pass"] * len(names)


@pytest.mark.parametrize("num_dims", [3, 5])
def test_a_number_of_dimensions_that_is_named_must_be_accepted(num_dims):
    norm = NO_BUGS[f"fails_for_{num_dims}_dims"]
    findings = examine(norm, names=["accepts_input"], num_dims=[2, num_dims])
    [finding] = itertools.islice(findings, 1)
    assert finding.verdict == "FAIL"
    assert finding.note.startswith(f"With {num_dims} dimensions, the layer raises ")
