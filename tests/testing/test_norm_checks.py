"""`norm_checks` in the tests of another project."""

import subprocess
import sys

import pytest

from bn_lightning import UserError
from bn_lightning.norms.check.examination import properties
from bn_lightning.testing import norm_checks
from tests.conftest import REPOSITORY

PROJECT = """
from functools import partial

import torch
from torch import nn

from bn_lightning.testing import norm_checks
from tests.support.planted_bases import HandWritten, LayerNorm
from tests.support.planted_state import InvertedMomentum


@norm_checks(HandWritten, identical=True, known_failures={"second_derivative": "not implemented"})
def test_correct(check):
    check()


@norm_checks(InvertedMomentum, known_failures={"mode": "no bug", "newest_batch_weight": "a bug"})
def test_known(check):
    check()


@norm_checks(InvertedMomentum)
def test_bug(check):
    check()


@norm_checks(LayerNorm, identical=True, num_dims=[2, 4], norm_args={"eps": 0.1})
def test_another_norm(check):
    check()
"""
CHOSEN = {
    "correct[mode]": "PASSED",
    "correct[second_derivative]": "XFAIL",
    "correct[same_gradients_in_training]": "PASSED",
    "known[mode]": "FAILED",
    "known[newest_batch_weight]": "XFAIL",
    "known[momentum]": "PASSED",
    "bug[newest_batch_weight]": "FAILED",
    "bug[second_derivative]": "PASSED",
    "another_norm[mode]": "PASSED",
    "another_norm[newest_batch_weight]": "SKIPPED",
    "another_norm[same_gradients_in_training]": "FAILED",
}


def test_cases_pass_fail_are_skipped_and_are_expected_to_fail(tmp_path):
    (tmp_path / "test_project.py").write_text(PROJECT)
    chosen = [f"test_project.py::test_{case}" for case in CHOSEN]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *chosen],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": ""},
        capture_output=True,
        text=True,
    )
    words = [line.split() for line in done.stdout.splitlines() if line.startswith("test_project")]
    outcomes = {name.removeprefix("test_project.py::test_"): word for name, word, *_ in words}
    assert outcomes == CHOSEN, done.stdout
    assert "[XPASS(strict)] no bug" in done.stdout
    assert "The newest batch has weight 0.9 in the running statistics" in done.stdout
    # A failure is a report, without a trace of this package.
    assert "Traceback" not in done.stdout and "findings.py" not in done.stdout


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


def test_an_unknown_name_is_an_error():
    with pytest.raises(UserError, match="Unknown property 'second_derivatives'"):
        norm_checks(object, known_failures={"second_derivatives": "a reason"})
