"""A run that was stopped goes on as if it had not been.

tests/support/kills.py does the same to many more runs.
"""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from bn_lightning import Classifier, ExactResume, FashionMNIST, WholeCheckpointIO
from bn_lightning.runs import run
from bn_lightning.training.stopping import Stopped
from tests.conftest import QUICK, REPOSITORY, needs_all_images
from tests.support import kills
from tests.support.logs import events_in
from tests.support.plain_loader import rows_of_a_line
from tests.support.runs import content_of, result_of

SWA = (
    "--trainer.callbacks+=bn_lightning.StochasticWeightAveraging",
    *("--trainer.callbacks.swa_lrs", "0.05", "--trainer.callbacks.swa_epoch_start", "1"),
)
PLATEAU = (
    *("--model.scheduler", "ReduceLROnPlateau", "--model.scheduler_args.patience", "0"),
    *("--model.scheduler_args.threshold", "0.5"),
)
COSINE = (
    *("--model.scheduler", "CosineAnnealingLR", "--model.optimizer_args.momentum", "0.9"),
    *("--model.lr", "0.1"),
)


def fails_at(step):
    """Return the code of a norm that stops the process in the forward pass of that step, once."""
    return (
        "import pathlib\nfrom bn_lightning import BatchNorm\n\n\nclass Norm(BatchNorm):\n"
        "    calls = 0\n\n"
        "    def forward(self, x):\n        Norm.calls += self.training\n"
        f"        if Norm.calls == 4 * {step} and not pathlib.Path('failed').exists():\n"
        "            pathlib.Path('failed').touch()\n            raise RuntimeError('planted')\n"
        "        return super().forward(x)\n"
    )


@pytest.mark.parametrize(
    ("settings", "step"),
    # An epoch has 22 steps.
    [((), 30), ((), 44), ((), 45), (SWA, 30), (SWA, 45), (PLATEAU, 44), (COSINE, 30)],
    ids=[
        "plain",
        "last step",
        "first step",
        "averaged",
        "averaged, first step",
        "plateau, last step",
        "cosine",
    ],
)
def test_what_fails_within_an_epoch_goes_on_exactly(main, tmp_path, monkeypatch, settings, step):
    every = ("--checkpoint.every_n_train_steps", 4)
    settings = (*QUICK, "--trainer.max_epochs", 3, *every, *settings)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "planted.py").write_text(fails_at(step))
    (tmp_path / "failed").touch()
    norm = ("--model.norm", "planted.Norm")
    assert main("fit", *settings, *norm, "--name", "whole")[0] == 0
    truth = kills.outcome(tmp_path / "runs/whole/0")
    (tmp_path / "failed").unlink()
    sys.modules["planted"].Norm.calls = 0
    with pytest.raises(RuntimeError, match="planted"):
        main("fit", *settings, *norm)
    assert main("fit", *settings, *norm, "--ckpt_path", "last")[0] == 0
    sys.modules.pop("planted")
    assert list(kills.differences(truth, kills.outcome(tmp_path / "runs/lenet/0"))) == []
    assert [path.name for path in (tmp_path / "runs/lenet").iterdir()] == ["0"]
    at = int(result_of(tmp_path / "runs/lenet/0")["resumed_at_steps"])
    assert step - 5 <= at < step


def test_a_run_that_max_steps_ended_within_an_epoch_goes_on_there(main, tmp_path):
    assert main("fit", *QUICK, "--name", "whole")[0] == 0
    assert main("fit", *QUICK, "--trainer.max_steps", 30)[0] == 0
    code, out, err = main("fit", "--resume", "runs/lenet/0", "--trainer.max_steps", -1)
    assert code == 0, err
    assert "Resuming from step 30 (runs/lenet/0/checkpoints/last.ckpt)" in out
    assert "changed: --trainer.max_steps -1, which was 30" in out
    one, other = (kills.outcome(tmp_path / f"runs/{name}/0") for name in ("whole", "lenet"))
    # But for the means that were logged when the epoch was cut short.
    means = ("/curves/train_loss_epoch", "/curves/train_acc", "/curves/epoch")
    assert [it for it in kills.differences(one, other) if not it.startswith(means)] == []
    folder = tmp_path / "runs/lenet/0"
    changed = yaml.safe_load((folder / "resumed-1.yaml").read_text())
    assert changed == {"trainer": {"max_steps": -1}}
    before = (folder / "config.yaml").read_text()
    assert "max_steps: 30" in before
    # It is finished now: nothing is changed, and it says the same again.
    code, out, err = main("fit", "--resume", "runs/lenet/0")
    assert code == 0, err
    assert "changed" not in out and not (folder / "resumed-2.yaml").exists()
    assert list(kills.differences(kills.outcome(folder), other)) == []


def test_early_stopping_stays_stopped(main, tmp_path):
    stops = (
        "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping",
        *("--trainer.callbacks.monitor", "val_acc", "--trainer.callbacks.mode", "max"),
        *("--trainer.callbacks.patience", 1),
        *("--trainer.max_epochs", 5, "--trainer.limit_train_batches", 3),
    )
    assert main("fit", *QUICK, *stops)[0] == 0
    epochs = result_of(tmp_path / "runs/lenet/0")["epochs"]
    assert epochs < 5
    assert main("fit", "--resume", "runs/lenet/0")[0] == 0
    assert result_of(tmp_path / "runs/lenet/0")["epochs"] == epochs


def test_a_moved_folder_keeps_its_best(main, trained, tmp_path):
    """The best of the first epochs is known there too, and a worse one does not take its place."""
    assert main("fit", *QUICK)[0] == 0
    shutil.move(tmp_path / "runs", tmp_path / "moved")
    best = tmp_path / "moved/lenet/0/checkpoints/best.ckpt"
    before = best.read_bytes()
    spoil = ("--model.lr", "100", "--trainer.max_epochs", 3, "--trainer.limit_train_batches", 3)
    code, out, err = main("fit", "--resume", "moved/lenet/0", *spoil)
    assert code == 0, err
    assert best.read_bytes() == before
    assert "tested best.ckpt of moved/lenet/0" in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("--seed_everything", 1), "--seed_everything was 0 when the run began and is now 1"),
        (("--data.val_images", 100), "--data.val_images was 5000"),
        (("--data.batch_size", 128), "--data.batch_size was 256"),
        (("--model.norm", "none"), "does not fit the network"),
        (("--trainer.max_steps", 40), "CosineAnnealingLR was planned for 30 steps"),
        (("--ckpt_path", "last"), "--resume and --ckpt_path are both given"),
        (("--trainer.fast_dev_run", "true"), "--resume continues a run"),
        pytest.param(
            ("--data.source", "system"), "was trained on other data", marks=needs_all_images
        ),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_would_make_it_another_run_is_refused_and_nothing_is_touched(
    main, tmp_path, settings, said
):
    assert main("fit", *QUICK, *COSINE, "--trainer.max_steps", 30)[0] == 0
    before = content_of(tmp_path / "runs/lenet/0")
    code, _, err = main("fit", "--resume", "runs/lenet/0", *settings)
    assert code == 2
    assert said in err
    assert "Traceback" not in err
    assert content_of(tmp_path / "runs/lenet/0") == before


def test_between_epochs_the_size_of_a_batch_may_change_and_that_is_said(main, tmp_path):
    assert main("fit", *QUICK)[0] == 0
    settings = ("--data.batch_size", 500, "--trainer.max_epochs", 3)
    code, out, err = main("fit", "--resume", "runs/lenet/0", *settings)
    assert code == 0, err
    assert "changed: --data.batch_size 500, which was 256" in out
    assert result_of(tmp_path / "runs/lenet/0")["steps"] == 44 + 11


def test_max_time_stops_within_an_epoch_and_tests_what_there_is(main, tmp_path):
    assert main("fit", *QUICK, "--name", "whole")[0] == 0
    code, out, err = main("fit", *QUICK, "--trainer.max_time", str({"milliseconds": 250}))
    assert code == 0, err
    assert "stopped by --trainer.max_time after step" in out
    assert "test acc" in out
    assert main("fit", "--resume", "runs/lenet/0", "--trainer.max_time", "null")[0] == 0
    one, other = (kills.outcome(tmp_path / f"runs/{name}/0") for name in ("whole", "lenet"))
    del one["curves"]["test_acc"], other["curves"]["test_acc"]
    assert list(kills.differences(one, other)) == []


def test_two_lines_of_python_are_enough(tmp_path):
    """Without the command line: a run that an exception has cut goes on from last.ckpt."""

    class Cut(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 31:
                raise InterruptedError

    def fit(where, *callbacks, ckpt_path=None):
        pl.seed_everything(0)
        trainer = pl.Trainer(
            max_epochs=2,
            accelerator="cpu",
            default_root_dir=tmp_path / where,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[*callbacks, ExactResume(every_n_train_steps=10)],
            plugins=[WholeCheckpointIO()],
        )
        data = FashionMNIST("sample", flip=True)
        trainer.fit(Classifier(), data, ckpt_path=ckpt_path, weights_only=True)
        return torch.load(tmp_path / where / "checkpoints/last.ckpt", weights_only=True)

    truth = fit("whole")
    with pytest.raises(InterruptedError):
        fit("cut", Cut())
    again = fit("cut", ckpt_path=tmp_path / "cut/checkpoints/last.ckpt")
    for name in ("state_dict", "optimizer_states", "global_step"):
        assert list(kills.differences(truth[name], again[name])) == []


def test_no_step_is_in_the_curves_twice_or_missing(main, tmp_path):
    every = (*QUICK, "--trainer.log_every_n_steps", 1)
    assert main("fit", *every, "--trainer.max_steps", 30)[0] == 0
    for steps in (12, -1):  # at first there is nothing left to do
        assert main("fit", "--resume", "runs/lenet/0", "--trainer.max_steps", steps)[0] == 0
    events = events_in(tmp_path / "runs/lenet/0")
    assert [event.step for event in events.Scalars("train_loss")] == list(range(44))


@pytest.mark.slow
@pytest.mark.timeout(900)  # eight runs or more, which take four times as long on a busy machine
@pytest.mark.parametrize("processes", [1, 2])
def test_kills(tmp_path, processes):
    settings = ("--kills", "3", "--writing", "2", "--processes", str(processes))
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.kills", *settings, "--folder", tmp_path],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# A training loader without a position, such as a plain DataLoader

PLAIN = "tests.support.plain_loader:EXPERIMENT"
LAST = Path("runs/plain/0/checkpoints/last.ckpt")


class Watch(pl.Callback):
    """Notes of which step last.ckpt is, at each batch, and asks to stop at one of them."""

    def __init__(self, stop_at=None):
        self.stop_at = stop_at
        self.saved = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        resume = next(c for c in trainer.callbacks if isinstance(c, ExactResume))
        self.saved.append(torch.load(resume.path, weights_only=True)["global_step"])
        if trainer.global_step == self.stop_at:
            resume.stop_requests._reason = signal.SIGTERM


def plain_fit(*settings, reference=PLAIN, stop_at=None):
    """Run fit in this process, and return of which step last.ckpt was at each batch."""
    watch = Watch(stop_at)
    run.command_line(["fit", *map(str, settings)], reference, callbacks=[watch])
    return watch.saved


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_without_a_position_it_is_saved_between_epochs_alone(here, capsys):
    saved = plain_fit("--checkpoint.every_n_train_steps", 3)
    assert saved == [0] * 10 + [10] * 10
    assert torch.load(LAST, weights_only=True)["global_step"] == 20
    out = capsys.readouterr().out
    assert out.count("the training loader, a DataLoader, has no position: last.ckpt is") == 1
    result = result_of(LAST.parent.parent)
    assert (result["steps"], result["finished"]) == (20, True)


def test_without_a_position_a_finished_run_is_resumed_at_the_end_of_its_epoch(here, capsys):
    plain_fit()
    saved = plain_fit("--resume", "runs/plain/0", "--trainer.max_epochs", 3)
    assert saved == [20] * 10
    assert "Resuming from step 20 (runs/plain/0/checkpoints/last.ckpt)" in capsys.readouterr().out
    result = result_of(LAST.parent.parent)
    assert (result["steps"], result["epochs"], result["resumed_at_steps"]) == (30, 3, "20")


@pytest.mark.parametrize(("step", "kept"), [(4, 0), (14, 10)])
def test_without_a_position_a_stop_keeps_the_end_of_the_last_epoch(here, capsys, step, kept):
    with pytest.raises(Stopped) as stopped:
        plain_fit(stop_at=step)
    assert stopped.value.code == 128 + signal.SIGTERM
    out = capsys.readouterr().out
    assert f"stopped by SIGTERM after step {step + 1}; saved until step {kept} in" in out
    assert torch.load(LAST, weights_only=True)["global_step"] == kept
    result = result_of(LAST.parent.parent)
    assert (result["steps"], result["finished"]) == (step + 1, False)
    plain_fit("--resume", "runs/plain/0")
    result = result_of(LAST.parent.parent)
    assert (result["steps"], result["resumed_at_steps"]) == (20, str(kept))


@pytest.mark.xfail(reason="ExactResume takes its epochs for unfinished", strict=True)
def test_a_loader_without_a_length_is_resumed_at_the_end_of_its_epoch(here):
    stream = "tests.support.plain_loader:STREAM"
    assert plain_fit(reference=stream) == [0] * 10 + [10] * 10
    plain_fit("--resume", "runs/stream/0", "--trainer.max_epochs", 3, reference=stream)
    result = result_of(Path("runs/stream/0"))
    assert (result["steps"], result["epochs"]) == (30, 3)


class Line(pl.LightningModule):
    """A module that is no Task."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_any_module_and_any_loader_are_saved_and_resumed(tmp_path, capsys):
    def fit(epochs, ckpt_path=None):
        module = Line()
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=[ExactResume()],
            plugins=[WholeCheckpointIO()],
        )
        loader = DataLoader(rows_of_a_line(), 8)  # in order, so that a resumed run is the same
        trainer.fit(module, loader, ckpt_path=ckpt_path, weights_only=True)
        return module.layer.weight.item()

    whole = fit(3)
    assert "a DataLoader, has no position" in capsys.readouterr().out
    fit(1)
    assert fit(3, ckpt_path=tmp_path / "checkpoints/last.ckpt") == whole
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 15


def test_a_loader_with_a_position_is_not_complained_of(trained):
    assert "no position" not in trained[1]
