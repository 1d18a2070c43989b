"""From an answer to a verdict."""

import pytest

from bn_lightning.norms.check.findings import (
    Check,
    NotApplicable,
    batch_norm_identity,
    measurement,
    norm_property,
)


def answered(decorator, answer, tolerance=0.5):
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
def test_verdicts(decorator, section, good, bad):
    for difference, verdict in ((0.5, good), (0.6, bad), (float("nan"), bad)):
        finding = answered(decorator, (difference, ""))
        assert (finding.section, finding.question) == (section, "a question")
        assert finding.verdict == verdict
        assert finding.note == ("" if difference == 0.5 else "an advice")


def test_a_cause_takes_the_place_of_the_advice():
    assert answered(norm_property, (1.0, "a cause")).note == "a cause"


def test_an_exception_is_a_finding():
    finding = answered(norm_property, KeyError("gamma\nand more"))
    assert (finding.verdict, finding.difference) == ("FAIL", None)
    assert finding.note == r"KeyError: 'gamma\nand more'"
    assert answered(norm_property, ValueError("first\nsecond")).note == "ValueError: first"
    assert answered(norm_property, ValueError()).note == "ValueError: "


def test_a_question_that_does_not_arise():
    finding = answered(batch_norm_identity, NotApplicable("a reason"))
    assert (finding.verdict, finding.difference, finding.note) == ("n/a", None, "a reason")
