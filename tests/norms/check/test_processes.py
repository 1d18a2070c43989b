"""The property that takes two processes: a planted bug is caught and named."""

from functools import partial

import pytest

from bn_lightning.norms.check import probes
from bn_lightning.norms.check.processes import two_processes_equal_one

FAULTY = "tests.support.faulty_norms"


def test_a_mean_of_means_is_caught_and_named():
    finding = two_processes_equal_one(partial(probes.make_layer, f"{FAULTY}.MeanOfMeans", {}))
    assert finding.verdict == "FAIL"
    assert "the mean of the processes' means" in finding.note


@pytest.mark.parametrize("name", ["article", f"{FAULTY}.Plain"])
def test_a_norm_that_cannot_synchronize_is_not_asked(name):
    finding = two_processes_equal_one(partial(probes.make_layer, name, {}))
    assert finding.verdict == "n/a"
    assert "no attribute sync_batchnorm" in finding.note


def test_the_custom_layer_passes():
    finding = two_processes_equal_one(partial(probes.make_layer, "custom", {}))
    assert finding.verdict == "pass", finding
