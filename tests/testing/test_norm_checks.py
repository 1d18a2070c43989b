"""The cases of `norm_checks`. tests/test_own_norm.py runs them in the tests of a project."""

import subprocess
import sys

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


def test_tests_of_a_norm_do_not_import_lightning():
    script = (
        "import sys\n"
        "from bn_lightning.testing import norm_checks\n"
        "assert 'lightning' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
