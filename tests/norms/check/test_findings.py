"""How a difference or an exception becomes a verdict."""

import pytest

from bn_lightning.norms.check.findings import (
    Check,
    NotApplicable,
    batch_norm_identity,
    measurement,
    norm_property,
)


def finding_for(decorator, answer, tolerance=0.5):
    @decorator("a question", tolerance=tolerance, advice="an advice")
    def check(make):
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert isinstance(check, Check)
    return check(None)


@pytest.mark.parametrize(
    ("decorator", "section", "good", "bad"),
    [
        (norm_property, "property", "pass", "FAIL"),
        (batch_norm_identity, "identity", "same", "DIFFERS"),
        (measurement, "measured", "measured", "measured"),
    ],
)
def test_verdict_depends_on_the_tolerance(decorator, section, good, bad):
    for difference, verdict in ((0.5, good), (0.6, bad), (float("nan"), bad)):
        finding = finding_for(decorator, (difference, ""))
        assert (finding.section, finding.question) == (section, "a question")
        assert finding.verdict == verdict
        assert finding.note == ("" if difference == 0.5 else "an advice")


def test_a_known_cause_replaces_the_advice():
    assert finding_for(norm_property, (1.0, "a cause")).note == "a cause"


def test_an_exception_is_reported_in_one_line():
    finding = finding_for(norm_property, KeyError("gamma\nand more"))
    assert (finding.verdict, finding.difference) == ("FAIL", None)
    assert finding.note == r"KeyError: 'gamma\nand more'"
    assert finding_for(norm_property, ValueError("first\nsecond")).note == "ValueError: first"
    assert finding_for(norm_property, ValueError()).note == "ValueError"


def test_a_check_that_does_not_apply_gives_the_reason():
    finding = finding_for(batch_norm_identity, NotApplicable("a reason"))
    assert (finding.verdict, finding.difference, finding.note) == ("n/a", None, "a reason")
