"""Properties: correct norms have them, and each bug is found and its cause is named."""

from functools import partial

import pytest

from bn_lightning.norms import registry
from bn_lightning.norms.check import command, probes, properties

FAULTY = "tests.support.faulty_norms"
# torch.compile is slow. The slow tests in `test_command` include it.
QUICK = [
    check
    for check in command.all_checks()
    if check in vars(properties).values() and check is not properties.compiles_in_one_graph
]
# For each bug: the property that fails, and a part of its note.
BUGS = {
    "StatisticsAreNotBuffers": (
        properties.state_is_restored_from_a_checkpoint,
        "Register the statistics as buffers",
    ),
    "EvalUsesTheBatch": (
        properties.eval_treats_samples_independently,
        "Eval mode uses the statistics of the batch",
    ),
    "VarianceWithoutGradient": (
        properties.gradient_matches_finite_differences,
        "No gradient flows through the variance",
    ),
    "GraphIsKept": (properties.keeps_no_graph_between_steps, "Detach the statistics of the batch"),
    "MomentumIsInverted": (
        properties.one_outlier_batch_does_not_dominate,
        "The momentum may be inverted.",
    ),
}


def make(name):
    return partial(probes.make_layer, name, {})


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_found_and_its_cause_is_named(bug):
    check, note = BUGS[bug]
    finding = check(make(f"{FAULTY}.{bug}"))
    assert finding.verdict == "FAIL"
    assert note in finding.note
    assert check(make(f"{FAULTY}.Plain")).verdict == "pass"


@pytest.mark.parametrize("name", ["custom", "builtin", "group", "renorm", f"{FAULTY}.Plain"])
def test_correct_norms_have_every_property(name):
    for check in QUICK:
        finding = check(make(name))
        assert finding.verdict == "pass", finding


def test_the_tutorials_layer_fails_only_for_its_mode():
    findings = [check(make("article")) for check in QUICK]
    (failed,) = (f for f in findings if f.verdict == "FAIL")
    assert failed.question == "mode follows module.training"
    assert "is_grad_enabled" in failed.note


def test_a_norm_that_does_not_center_passes():
    findings = [check(make(f"{FAULTY}.RMSNorm")) for check in QUICK]
    assert {f.verdict for f in findings} == {"pass", "n/a"}
    assert any("does not center" in f.note for f in findings)


def test_the_identity_layer_fails():
    findings = [check(make("none")) for check in QUICK]
    failed = {f.question for f in findings if f.verdict == "FAIL"}
    assert "output does not depend on the scale of the input" in failed


def test_every_norm_of_the_registry_is_checked_in_this_file():
    assert set(registry.NORMS) == {"custom", "builtin", "article", "group", "renorm", "none"}
