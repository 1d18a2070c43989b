"""Scripts that show a failure: short, with PyTorch and the norm only, and about this failure."""

import subprocess
import sys

import pytest

from bn_lightning.norms.check import examination, reproduction
from tests.conftest import REPOSITORY, command
from tests.support import planted_bases
from tests.support.planted_bugs import BUGS

# The base of each bug, which is right.
BASES = [
    planted_bases.HandWritten,
    planted_bases.SyncBatchNorm,
    planted_bases.BatchNorm,
    planted_bases.LayerNorm,
    planted_bases.GroupNorm,
    planted_bases.InstanceNorm,
    planted_bases.RMSNorm,
]
# One bug for most properties.
SHOWN = [
    "grad_mode_for_training",
    "ignored_momentum",
    "counts_in_eval",
    "biased_running_var",
    "shared_by_class",
    "not_saved",
    "graph_kept",
    "gamma_twice",
    "sum_for_mean",
    "eps_ignored",
    "returns_float32",
    "memory_order",
    "backward_of_training_in_eval",
    "saved_output",
    "frozen_gamma_stops_gradient",
    "made_on_cpu",
]


def script_for(norm, name):
    """Return the script for a failure, and whether it does without this package."""
    subject = examination.prepare(norm, norm.__name__, num_dims=[2, 4])
    [found] = examination.Examination(subject, names=[name]).properties()
    text = reproduction.script(found, found.examine(subject), subject.build)
    return text, "import examine" not in text


def run(text):
    return exec(text, {"__name__": "__main__"})


@pytest.mark.parametrize("bug", SHOWN)
def test_a_script_fails_for_the_bug_and_not_for_the_correct_layer(bug):
    norm, name = BUGS[bug]
    text, is_self_contained = script_for(norm, name)
    assert is_self_contained
    assert len(text.splitlines()) <= 15
    assert all(len(line) <= 120 for line in text.splitlines())
    with pytest.raises(Exception):  # noqa: B017
        run(text)
    base = next(b for b in BASES if issubclass(norm, b))
    right = text.replace(
        f"{norm.__module__} import {norm.__name__}",
        f"{base.__module__} import {base.__name__} as {norm.__name__}",
    )
    run(right)


def test_a_script_may_call_the_check_if_a_short_one_does_not_show_the_failure():
    norm, name = BUGS["wrong_cumulative_average"]
    text, is_self_contained = script_for(norm, name)
    assert not is_self_contained
    with pytest.raises(AssertionError, match="1 / n"):
        run(text)


@pytest.mark.slow
def test_the_printed_script_runs_in_a_process_of_its_own(tmp_path):
    bug = "tests.support.planted_state.InvertedMomentum"
    done = command("check", bug, "--reproduce", "newest_batch_weight", cwd=REPOSITORY, check=False)
    assert done.returncode == 1
    (tmp_path / "script.py").write_text(done.stdout)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"],
        env={"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "AssertionError" in done.stderr


def test_nothing_is_reproduced_if_the_property_holds(main):
    code, output, _ = main("check", "custom", "--reproduce", "mode", "--num_dims", "2")
    assert code == 0
    assert output.startswith("mode: pass. There is no failure to reproduce.")
