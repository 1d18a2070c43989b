"""The property that needs two processes: a bug is found, and its cause is named."""

from functools import partial

import pytest

from bn_lightning.norms.check import probes
from bn_lightning.norms.check import processes as check
from tests.support import processes

FAULTY = "tests.support.faulty_norms"


@pytest.fixture(autouse=True)
def forked_processes(monkeypatch):
    """Fork the two processes, which is faster than spawning them as the command does."""
    monkeypatch.setattr(check, "spawn", processes.start)


def test_equal_weights_of_unequal_shards_are_found_and_named():
    finding = check.two_processes_equal_one(partial(probes.make_layer, f"{FAULTY}.MeanOfMeans", {}))
    assert finding.verdict == "FAIL"
    assert "averages the means of the processes with equal weights" in finding.note


@pytest.mark.parametrize("name", ["article", f"{FAULTY}.Plain"])
def test_check_does_not_apply_to_a_norm_without_sync_batchnorm(name):
    finding = check.two_processes_equal_one(partial(probes.make_layer, name, {}))
    assert finding.verdict == "n/a"
    assert "no attribute sync_batchnorm" in finding.note


def test_the_layer_from_scratch_passes():
    finding = check.two_processes_equal_one(partial(probes.make_layer, "custom", {}))
    assert finding.verdict == "pass", finding
