"""Which errors are wrong settings, with a message, and which are bugs, with a stack trace."""

from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

from bn_lightning import ExactDataLoader, UserError
from bn_lightning.runs import refusals
from tests.conftest import BRIEF

CALLBACK = "--trainer.callbacks+="
# Flags, and a part of the message.
WRONG = {
    "package": ([f"{CALLBACK}DeviceStatsMonitor"], "psutil"),
    "package of a logger": (["--trainer.logger", "WandbLogger"], "wandb"),
    "attribute": ([f"{CALLBACK}BackboneFinetuning"], "no attribute 'backbone'"),
    "first step": (["--model.optimizer", "SparseAdam"], "SparseAdam does not support dense"),
    "constructor": (
        [f"{CALLBACK}ModelPruning", "--trainer.callbacks.pruning_fn", "foo"],
        "`pruning_fn` foo",
    ),
    "loader": (["--trainer.val_check_interval", 100], "`val_check_interval` (100) must be less"),
    "two of a class": (
        [f"{CALLBACK}ModelCheckpoint", f"{CALLBACK}ModelCheckpoint"],
        "more than one stateful callback of type `ModelCheckpoint`",
    ),
    "training start": (
        [
            *(f"{CALLBACK}GradientAccumulationScheduler", "--trainer.callbacks.scheduling"),
            *("{0: 2}", "--trainer.accumulate_grad_batches", 2),
        ],
        "You have set `accumulate_grad_batches`",
    ),
    "optimizer": (
        [
            *("--model.optimizer", "Adam", "--model.optimizer_args.fused", "true"),
            *("--model.optimizer_args.foreach", "true"),
        ],
        "`fused` and `foreach` cannot be `True` together",
    ),
    "first update of the scheduler": (
        ["--model.scheduler", "StepLR", "--model.scheduler_args.step_size", 0],
        "StepLR cannot be created with {'step_size': 0}",
    ),
}


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
@pytest.mark.parametrize("what", WRONG)
def test_an_error_of_a_library_before_the_first_step_is_a_message(
    main, tmp_path, monkeypatch, what
):
    flags, message = WRONG[what]
    if what == "package":
        from lightning.pytorch.callbacks import device_stats_monitor

        monkeypatch.setattr(device_stats_monitor, "_PSUTIL_AVAILABLE", False)
    code, _, err = main("fit", *BRIEF, *flags)
    assert code == 2
    assert "error: " in err and message in err
    assert "Traceback" not in err
    assert not list(tmp_path.glob("runs/lenet/*"))


BROKEN = """
import lightning.pytorch as pl
import torch


class Constructor(pl.Callback):
    def __init__(self):
        raise ValueError("mine")


class Import(pl.Callback):
    def __init__(self):
        import nowhere


class Torch(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        torch.nn.Linear(2, 3)(torch.zeros(4))


class Lookup(pl.Callback):
    def setup(self, trainer, pl_module, stage):
        {}["x"]
"""


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("Constructor", ValueError),
        ("Import", ValueError),  # jsonargparse wraps it
        ("Torch", RuntimeError),
        ("Lookup", KeyError),
    ],
)
def test_an_error_in_code_of_the_user_keeps_its_stack_trace(main, tmp_path, name, error):
    (tmp_path / "broken_callbacks.py").write_text(BROKEN)
    with pytest.raises(error) as raised:
        main("fit", *BRIEF, f"{CALLBACK}broken_callbacks.{name}")
    assert not isinstance(raised.value, UserError)
    assert not list(tmp_path.glob("runs/lenet/*"))


class Broken(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        raise RuntimeError("a mistake in the data set")


@pytest.mark.parametrize("loader", [DataLoader, ExactDataLoader])
def test_an_error_in_a_worker_of_a_loader_is_not_a_setting(loader):
    with pytest.raises(RuntimeError, match="a mistake in the data set") as raised:
        list(loader(Broken(), 2, num_workers=1))
    # As if the framework had called the loader.
    assert refusals.find(raised.value.with_traceback(raised.tb.tb_next)) is None


def test_failures_of_the_machine_and_own_errors_are_not_settings():
    def raised(call):
        with pytest.raises(Exception) as error:
            call()
        return error.value

    assert refusals.find(raised(lambda: Path("nowhere").read_text())) is None
    own = UserError("mine")
    assert refusals.find(own) is own
    wrapped = ValueError("wrapped")
    wrapped.__cause__ = own
    assert refusals.find(wrapped) is own
