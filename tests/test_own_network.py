"""The guide "Your own network": its files are written as printed, and its tests are run.

tests/test_readme.py runs its commands.
"""

import re
import subprocess
import sys

import pytest

from tests.test_readme import example


@pytest.mark.slow
def test_the_tests_of_the_guide_pass(tmp_path):
    (tmp_path / "my_networks.py").write_text(example("class TwoLayers"))
    (tmp_path / "test_my_network.py").write_text(example("class TestTwoLayers"))
    # tests/testing/test_task_tests.py has those that start runs.
    slow = "not killed and not reproduce and not processes and not its_results"
    program = [sys.executable, "-m", "pytest", "-q", "test_my_network.py", "-k", slow]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) == 14
