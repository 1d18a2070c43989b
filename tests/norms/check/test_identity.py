"""Identity with PyTorch's BatchNorm: each bug is found, and its cause is named."""

from functools import partial

import pytest

from bn_lightning.norms.check import command, identity, probes

FAULTY = "tests.support.faulty_norms"
CHECKS = [check for check in command.all_checks() if check in vars(identity).values()]
# For each bug: the check that finds it, and a part of its note.
BUGS = {
    "WrongAxis": (
        identity.same_output_in_training,
        "over images, height. Batch normalization takes them over images, height, width.",
    ),
    "MomentumIsInverted": (
        identity.same_running_stats,
        "momentum is inverted",
    ),
    "RunningVarianceIsBiased": (
        identity.same_running_stats,
        "biased: it is divided by m instead of m - 1",
    ),
}


def make(name):
    return partial(probes.make_layer, name, {})


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_found_and_its_cause_is_named(bug):
    check, note = BUGS[bug]
    finding = check(make(f"{FAULTY}.{bug}"))
    assert finding.verdict == "DIFFERS"
    assert note in finding.note
    assert check(make(f"{FAULTY}.Plain")).verdict in ("same", "n/a")


@pytest.mark.parametrize("name", ["custom", "builtin", f"{FAULTY}.Plain"])
def test_batch_norms_equal_pytorchs_in_every_check(name):
    for check in CHECKS:
        finding = check(make(name))
        assert finding.verdict == "same", finding


def test_the_tutorials_layer_differs_only_in_its_biased_variance():
    findings = [check(make("article")) for check in CHECKS]
    (differs,) = (f for f in findings if f.verdict == "DIFFERS")
    assert differs.question == "running statistics after three steps"
    assert "biased" in differs.note


@pytest.mark.parametrize("name", ["group", "renorm"])
def test_norms_of_another_kind_differ(name):
    assert "DIFFERS" in {check(make(name)).verdict for check in CHECKS}
