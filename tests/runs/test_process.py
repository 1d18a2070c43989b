"""Settings of the process: warnings, log levels and threads."""

import logging
import os
import subprocess
import sys
import threading
import warnings

import pytest
from lightning.pytorch.utilities.warnings import PossibleUserWarning

from bn_lightning.runs import process
from tests.conftest import PROJECTS, REPOSITORY

# Lightning's warning about a test on several processes with a loader of PyTorch.
DUPLICATED = (
    "Using `DistributedSampler` with the dataloaders. During `trainer.test()`, it is recommended "
    "to use `Trainer(devices=1, num_nodes=1)` to ensure each sample/batch gets evaluated exactly "
    "once. Otherwise, multi-device settings use `DistributedSampler` that replicates some samples "
    "to make sure all devices have same batch size in case of uneven inputs."
)


@pytest.fixture
def set_up():
    """Set up this process, and restore it after the test."""
    loggers = [n for n in logging.root.manager.loggerDict if n.startswith("lightning")]
    levels = {name: logging.getLogger(name).level for name in loggers}
    hook = threading.excepthook
    with warnings.catch_warnings():
        warnings.resetwarnings()
        process.set_up()
        yield
    threading.excepthook = hook
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def test_lightnings_warning_about_duplicated_samples_is_shown(set_up):
    with warnings.catch_warnings(record=True) as shown:
        warnings.warn(DUPLICATED, PossibleUserWarning, stacklevel=1)
    assert [str(warning.message) for warning in shown] == [DUPLICATED]


def test_warnings_that_do_not_apply_are_hidden(set_up):
    with warnings.catch_warnings(record=True) as shown:
        for message in (
            "LightningCLI's args parameter is intended to run from within Python",
            "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need",
            "Checkpoint directory /a/b exists and is not empty.",
            "The dirpath has changed from None to '/a'",
        ):
            warnings.warn(message, UserWarning, stacklevel=1)
        assert shown == []
        warnings.warn("something else", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["something else"]


def test_lightnings_tips_are_hidden(set_up):
    assert not logging.getLogger("lightning.pytorch.utilities.rank_zero").isEnabledFor(logging.INFO)
    assert logging.getLogger("lightning.pytorch.utilities.rank_zero").isEnabledFor(logging.WARNING)


@pytest.mark.parametrize(("error", "is_shown"), [(OSError("full"), False), (ValueError("x"), True)])
def test_a_trace_of_an_oserror_in_a_thread_is_hidden(set_up, capsys, error, is_shown):
    def fail():
        raise error

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    assert ("Traceback" in capsys.readouterr().err) == is_shown


@pytest.mark.slow
def test_a_run_warns_about_duplicated_samples(tmp_path):
    """With a loader of PyTorch on two processes, 101 rows are counted as 102."""
    (tmp_path / "rows.py").write_text(
        "from torch.utils.data import DataLoader, TensorDataset\n"
        "from bn_lightning import Experiment, cli\n"
        "from friedman.experiment import Regression, Table\n\n\n"
        "class Plain(Table):\n    def test_dataloader(self):\n"
        "        return DataLoader(TensorDataset(*self.test_samples()), 20)\n\n\n"
        "EXPERIMENT = Experiment(Regression, Plain, 'rows', {'data.rows': 202})\n"
        "if __name__ == '__main__':\n    cli.main('rows:EXPERIMENT')\n"
    )
    settings = ("--trainer.max_epochs", "1", "--trainer.devices", "2", "--trainer.accelerator")
    done = subprocess.run(
        [sys.executable, "rows.py", "fit", *settings, "cpu"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{PROJECTS}:{REPOSITORY}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Using `DistributedSampler` with the dataloaders" in done.stderr
