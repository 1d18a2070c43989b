"""The cases of `norm_checks`. tests/test_own_norm.py runs them in the tests of a project."""

from bn_lightning.norms.check.examination import properties
from bn_lightning.testing import norm_checks


def test_there_is_a_case_for_each_property_and_its_id_is_the_name():
    for identical in (False, True):
        [mark] = decorate(norm_checks(object, identical=identical)).pytestmark
        expected = [
            p.name
            for p in properties()
            if p.section != "measured" and (identical or p.section != "identity")
        ]
        assert [case.id for case in mark.args[1]] == expected


def decorate(decorator):
    @decorator
    def test(check):
        check()

    return test
