"""The ranks of a run must start with the same data, settings and step."""

import pytest

from tests.conftest import start
from tests.support.processes import free_port

EXPERIMENT = """\
import os

from bn_lightning import Experiment, cli
from friedman.experiment import Regression, Table


class Own(Table):
    def identity(self):
        source, rank = os.environ.get("NODE_RANK"), os.environ.get("OTHER_DATA_ON")
        return {"source": source, "other": source == rank}


DEFAULTS = {"data.rows": 100, "data.batch_size": 50, "trainer.max_epochs": 1}
EXPERIMENT = Experiment(Regression, Own, "own", DEFAULTS)
if __name__ == "__main__":
    cli.main("own_data:EXPERIMENT")
"""


def fit_on_two_machines(cwd, first, second, environment=None):
    """Run `fit` with other arguments on each of two machines. Return the process of each."""
    (cwd / "own_data.py").write_text(EXPERIMENT)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_RANK": "0"}
    runs = []
    for rank, arguments in enumerate((first, second)):
        settings = ("fit", "--trainer.num_nodes", 2, "--trainer.devices", 1, *arguments)
        variables = {**shared, "NODE_RANK": str(rank), **(environment or {})}
        runs.append(start(*settings, cwd=cwd, module="own_data", environment=variables))
    return [(run.communicate(timeout=120), run.returncode) for run in runs]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("second", "environment", "message"),
    [
        ((), {"OTHER_DATA_ON": "1"}, "differ in the data: Friedman's problem, 100 rows on rank 0"),
        (("--data.batch_size", 25), {}, "differ in --data.batch_size: 50 on rank 0, but 25 on"),
        (("--model.lr", 0.5), {}, "differ in --model.lr: 0.1 on rank 0, but 0.5 on rank 1"),
    ],
)
def test_ranks_that_differ_are_refused_before_the_first_step(
    tmp_path, second, environment, message
):
    [((_, err), code), ((_, other_err), _)] = fit_on_two_machines(tmp_path, (), second, environment)
    assert (code, message in err) == (2, True), err
    assert "Traceback" not in err + other_err
    assert list((tmp_path / "runs/own").iterdir()) == []


@pytest.mark.slow
def test_ranks_that_start_at_different_steps_are_refused(tmp_path):
    """The second machine does not see the checkpoint of the first one."""
    [(_, code), _] = fit_on_two_machines(tmp_path, (), ())  # sources may differ
    assert code == 0
    more = ("--trainer.max_epochs", 2)
    last = ("--ckpt_path", "runs/own/0/checkpoints/last.ckpt")
    [((_, err), code), _] = fit_on_two_machines(tmp_path, (*last, *more), more)
    assert code == 2
    assert "differ in the step at which they start: 2 on rank 0, but 0 on rank 1" in err
