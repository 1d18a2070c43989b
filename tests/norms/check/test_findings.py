"""How comparisons and exceptions become a verdict."""

import pytest
import torch

from bn_lightning import UserError
from bn_lightning.norms.check import findings
from bn_lightning.norms.check.examination import examine, properties
from bn_lightning.norms.check.findings import SECTIONS, Comparison, NotApplicable, norm_property
from bn_lightning.norms.check.subject import Norm
from tests.support.planted_bases import BatchNorm

NORM = Norm(None, {}, {}, frozenset())


def finding_for(section, answers):
    @norm_property(section, "A question.", advice="An advice.")
    def some_property(norm):
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
            yield answer

    return some_property.examine(NORM)


@pytest.mark.parametrize(
    ("section", "good", "bad"),
    [("results", "pass", "FAIL"), ("identity", "same", "DIFFERS")],
)
def test_verdict_depends_on_the_tolerance(section, good, bad):
    for difference, verdict in ((0.5, good), (0.6, bad), (float("nan"), bad), (torch.inf, bad)):
        finding = finding_for(section, [Comparison(0.1, 0.5), Comparison(difference, 0.5)])
        assert (finding.section, finding.name) == (section, "some_property")
        note = "The result is NaN." if difference != difference else "An advice."
        assert (finding.verdict, finding.note) == (verdict, "" if verdict == good else note)


def test_the_largest_good_difference_or_the_first_bad_one_is_reported():
    comparisons = [Comparison(0.3, 1), Comparison(0.4, 1), Comparison(0.2, 1)]
    assert finding_for("results", comparisons).difference == 0.4
    comparisons = [Comparison(2, 1, "First."), Comparison(3, 1, "Second.")]
    finding = finding_for("results", comparisons)
    assert (finding.difference, finding.note) == (2, "First.")


def test_what_does_not_apply_has_a_reason():
    finding = finding_for("results", [Comparison(0, 1), NotApplicable("A reason.")])
    assert (finding.verdict, finding.difference, finding.note) == ("n/a", None, "A reason.")
    assert finding_for("results", []).verdict == "n/a"


class Raises(BatchNorm):
    def forward(self, x):
        if not x.is_contiguous():
            raise KeyError("gamma\nand more")
        return super().forward(x)


def test_an_exception_shows_the_lines_of_the_user_and_nothing_else():
    [finding] = examine(Raises, names=["memory_layout"], num_dims=[2])
    assert (finding.verdict, finding.difference) == ("FAIL", None)
    line = Raises.forward.__code__.co_firstlineno + 2
    assert finding.note.splitlines() == [
        r"KeyError: 'gamma\nand more'",
        rf'In {__file__}, line {line}: raise KeyError("gamma\nand more")',
    ]
    assert str(finding.case) == "input (12, 6), float64, training"


def test_each_property_has_a_name_of_its_own_and_sections_are_in_order():
    found = properties()
    assert len({p.name for p in found}) == len(found)
    sections = [p.section for p in found]
    assert sections == sorted(sections, key=list(SECTIONS).index)
    assert all(p.question.endswith(".") and len(p.question) <= 100 for p in found)


def test_an_unknown_name_is_a_users_error():
    with pytest.raises(UserError, match=r"Unknown property 'modes'\. Did you mean mode\?"):
        findings.choose(properties(), ["counter", "modes"])
