"""The properties: sound norms have them, and a planted bug is caught and named."""

from functools import partial

import pytest

from bn_lightning.norms import registry
from bn_lightning.norms.check import command, probes, properties

FAULTY = "tests.support.faulty_norms"
# torch.compile takes seconds, and `test_command` runs it.
QUICK = [
    check
    for check in command.all_checks()
    if check in vars(properties).values() and check is not properties.compiles_in_one_graph
]
# A bug: the property that it lacks, and the cause that the finding names.
BUGS = {
    "StatisticsAreNotBuffers": (
        properties.state_survives_a_checkpoint,
        "register the statistics as buffers",
    ),
    "EvalUsesTheBatch": (
        properties.eval_treats_samples_independently,
        "eval uses the statistics of its batch",
    ),
    "VarianceWithoutGradient": (
        properties.gradient_matches_finite_differences,
        "no gradient flows through the variance",
    ),
    "GraphIsKept": (properties.keeps_no_graph_between_steps, "detach the batch's statistics"),
    "MomentumTheWrongWayRound": (
        properties.one_odd_batch_does_not_dominate,
        "is the momentum the wrong way round?",
    ),
}


def make(name):
    return partial(probes.make_layer, name, {})


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught_and_named(bug):
    check, note = BUGS[bug]
    finding = check(make(f"{FAULTY}.{bug}"))
    assert finding.verdict == "FAIL"
    assert note in finding.note
    assert check(make(f"{FAULTY}.Plain")).verdict == "pass"


@pytest.mark.parametrize("name", ["custom", "builtin", "group", "renorm", f"{FAULTY}.Plain"])
def test_sound_norms_have_every_property(name):
    for check in QUICK:
        finding = check(make(name))
        assert finding.verdict == "pass", finding


def test_the_articles_layer_lacks_one():
    findings = [check(make("article")) for check in QUICK]
    (failed,) = (f for f in findings if f.verdict == "FAIL")
    assert failed.question == "training is told by module.training"
    assert "is_grad_enabled" in failed.note


def test_a_norm_that_does_not_centre_is_sound():
    findings = [check(make(f"{FAULTY}.RMSNorm")) for check in QUICK]
    assert {f.verdict for f in findings} == {"pass", "n/a"}
    assert any("does not centre" in f.note for f in findings)


def test_no_norm_at_all_is_no_norm():
    findings = [check(make("none")) for check in QUICK]
    failed = {f.question for f in findings if f.verdict == "FAIL"}
    assert {"the scale of the input does not matter"} <= failed


def test_every_norm_of_the_registry_is_examined_here():
    assert set(registry.NORMS) == {"custom", "builtin", "article", "group", "renorm", "none"}
