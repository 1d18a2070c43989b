from functools import partial

from bn_lightning.norms.check import measurements, probes


def test_memory_is_measured_beside_torchs():
    finding = measurements.memory_kept_for_the_backward_pass(
        partial(probes.make_layer, "builtin", {})
    )
    assert (finding.verdict, finding.difference) == ("measured", 1.0)
    own, reference = finding.note.split(" bytes beside ")
    assert own == reference


def test_time_is_measured_beside_torchs():
    finding = measurements.time_behind_a_linear_layer(partial(probes.make_layer, "builtin", {}))
    assert finding.verdict == "measured"
    assert finding.difference > 0
    assert finding.note.count(" ms") == 2
