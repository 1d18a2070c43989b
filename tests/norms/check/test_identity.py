"""The identity with torch's BatchNorm: what differs is named."""

from functools import partial

import pytest

from bn_lightning.norms.check import command, identity, probes

FAULTY = "tests.support.faulty_norms"
CHECKS = [check for check in command.all_checks() if check in vars(identity).values()]
# A bug: what differs, and the cause that the finding names.
BUGS = {
    "WrongAxis": (
        identity.same_output_in_training,
        "statistics over images, height; batch normalization over images, height, width",
    ),
    "MomentumTheWrongWayRound": (
        identity.same_running_stats,
        "momentum is the wrong way round",
    ),
    "RunningVarianceIsBiased": (
        identity.same_running_stats,
        "biased: divided by m and not by m - 1",
    ),
}


def make(name):
    return partial(probes.make_layer, name, {})


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught_and_named(bug):
    check, note = BUGS[bug]
    finding = check(make(f"{FAULTY}.{bug}"))
    assert finding.verdict == "DIFFERS"
    assert note in finding.note
    assert check(make(f"{FAULTY}.Plain")).verdict in ("same", "n/a")


@pytest.mark.parametrize("name", ["custom", "builtin", f"{FAULTY}.Plain"])
def test_batch_norms_are_the_same(name):
    for check in CHECKS:
        finding = check(make(name))
        assert finding.verdict == "same", finding


def test_the_articles_layer_has_a_biased_variance():
    findings = [check(make("article")) for check in CHECKS]
    (differs,) = (f for f in findings if f.verdict == "DIFFERS")
    assert differs.question == "running statistics after three steps"
    assert "biased" in differs.note


@pytest.mark.parametrize("name", ["group", "renorm"])
def test_a_norm_that_is_meant_to_differ_is_not_the_same(name):
    assert "DIFFERS" in {check(make(name)).verdict for check in CHECKS}
