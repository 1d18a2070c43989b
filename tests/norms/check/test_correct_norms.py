"""Correct layers of many kinds have every property that applies to them."""

import pytest

from bn_lightning.norms.check.examination import Examination, prepare, properties
from tests.support.correct_norms import BATCH_NORMS, LAYERS

# Each takes seconds. The slow tests in `test_command` and `test_processes` include them.
SLOW = ("compiled", "compiled_by_inductor", "onnx", "synchronization", "time_per_step")
NAMES = [found.name for found in properties() if found.name not in SLOW]
# In the quick suite, one layer of each kind.
QUICK = (
    "t5_layer_norm",
    "weight_standardized_conv",
    "ghost_4",
    "batch_renorm",
    "other_names",
)
# A layer whose windows overlap, which PyTorch implements for some dtypes and layouts only.
NO_NORM = "torch_local_response_norm"
# Without running statistics, nothing can be compared with PyTorch's layer in evaluation.
NOT_COMPARABLE = "without_running_statistics"


CASES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in LAYERS
    if name != NO_NORM
]


@pytest.mark.parametrize("name", CASES)
def test_a_correct_layer_passes(name):
    is_identical = name in BATCH_NORMS and name != NOT_COMPARABLE
    num_dims = [4] if name in QUICK and name != "t5_layer_norm" else None
    norm = prepare(LAYERS[name], name, num_dims=num_dims)
    examination = Examination(norm, is_identical, NAMES)
    if not is_identical:
        examination.names = [p.name for p in properties() if p.section != "identity"]
        examination.names = [n for n in examination.names if n not in SLOW]
    findings = list(examination.run())
    assert [f for f in findings if f.verdict in ("FAIL", "DIFFERS")] == []
    assert examination.passed(findings)


def test_a_layer_without_running_statistics_is_not_identical():
    norm = prepare(LAYERS[NOT_COMPARABLE], NOT_COMPARABLE, num_dims=[4])
    examination = Examination(norm, True, ["same_output_in_evaluation"])
    assert not examination.passed(list(examination.run()))
