"""Time and memory, relative to PyTorch's layer."""

from functools import partial

from bn_lightning.norms.check import measurements, probes


def test_memory_is_compared_with_pytorchs_layer():
    finding = measurements.memory_saved_for_the_backward_pass(
        partial(probes.make_layer, "builtin", {})
    )
    assert (finding.verdict, finding.difference) == ("measured", 1.0)
    own, reference = finding.note.split(" bytes, compared with ")
    assert own == reference


def test_time_is_compared_with_pytorchs_layer():
    finding = measurements.time_after_a_linear_layer(partial(probes.make_layer, "builtin", {}))
    assert finding.verdict == "measured"
    assert finding.difference > 0
    assert finding.note.count(" ms") == 2
