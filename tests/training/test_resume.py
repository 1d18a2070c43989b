"""A run that was stopped and resumed is equal to an uninterrupted run.

tests/support/kills.py kills many more runs.
"""

import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MaxMetric, MeanMetric, MetricCollection

from bn_lightning import (
    Classifier,
    DataModule,
    ExactDataLoader,
    ExactResume,
    FashionMNIST,
    UserError,
    WholeCheckpointIO,
)
from bn_lightning.runs import run
from bn_lightning.training.stopping import Stopped
from tests.conftest import BRIEF, QUICK, REPOSITORY, needs_all_images, run_here
from tests.support import kills
from tests.support.logs import events_in
from tests.support.plain_loader import rows_of_a_line
from tests.support.runs import content_of, result_of

# Only the command line suppresses this warning.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

# An epoch has 6 batches of 32 images.
SHORT = (*BRIEF, "--trainer.limit_train_batches", "6")
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


# A norm that raises in the forward pass of the step that the file `fail_at` names, once.
NORM = """\
from pathlib import Path
from bn_lightning import BatchNorm


class Norm(BatchNorm):
    calls = 0

    def forward(self, x):
        Norm.calls += self.training
        plan = Path("fail_at")
        if plan.exists() and Norm.calls == 4 * int(plan.read_text()):
            plan.unlink()
            raise RuntimeError("planted")
        return super().forward(x)
"""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Return a function that runs `fit` without interruption and returns the outcome."""
    outcomes = {}

    def outcome(*settings):
        if settings not in outcomes:
            cwd = tmp_path_factory.mktemp("uninterrupted")
            (cwd / "planted.py").write_text(NORM)
            run_here("fit", *settings, cwd=cwd)
            outcomes[settings] = kills.outcome(cwd / "runs/lenet/0")
        return outcomes[settings]

    return outcome


@pytest.mark.parametrize(
    ("settings", "step"),
    [
        pytest.param((), 10, id="plain"),
        pytest.param((), 12, id="last step", marks=pytest.mark.slow),
        pytest.param((), 13, id="first step", marks=pytest.mark.slow),
        pytest.param(SWA, 10, id="averaged", marks=pytest.mark.slow),
        pytest.param(SWA, 13, id="averaged, first step"),
        pytest.param(PLATEAU, 12, id="plateau, last step", marks=pytest.mark.slow),
        pytest.param(COSINE, 10, id="cosine", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_failed_within_an_epoch_resumes_bit_identically(
    main, uninterrupted, tmp_path, settings, step
):
    every = ("--checkpoint.every_n_train_steps", 4)
    norm = ("--model.norm", "planted.Norm")
    settings = (*SHORT, "--trainer.max_epochs", 3, *every, *settings, *norm)
    truth = uninterrupted(*settings)
    (tmp_path / "planted.py").write_text(NORM)
    (tmp_path / "fail_at").write_text(str(step))
    with pytest.raises(RuntimeError, match="planted"):
        main("fit", *settings)
    assert main("fit", *settings, "--ckpt_path", "last")[0] == 0
    assert list(kills.differences(truth, kills.outcome(tmp_path / "runs/lenet/0"))) == []
    assert [path.name for path in (tmp_path / "runs/lenet").iterdir()] == ["0"]
    at = int(result_of(tmp_path / "runs/lenet/0")["resumed_at_steps"])
    assert step - 5 <= at < step


def test_a_run_that_max_steps_ended_within_an_epoch_resumes_there(main, uninterrupted, tmp_path):
    assert main("fit", *SHORT, "--trainer.max_steps", 8)[0] == 0
    code, out, err = main("fit", "--resume", "runs/lenet/0", "--trainer.max_steps", -1)
    assert code == 0, err
    assert "Resuming from step 8 (runs/lenet/0/checkpoints/last.ckpt)" in out
    assert "changed: --trainer.max_steps -1 (was 8)" in out
    folder = tmp_path / "runs/lenet/0"
    one, other = uninterrupted(*SHORT), kills.outcome(folder)
    # The means that were logged at the end of the incomplete epoch differ.
    means = ("/curves/train_loss_epoch", "/curves/train_acc", "/curves/epoch")
    assert [it for it in kills.differences(one, other) if not it.startswith(means)] == []
    changed = yaml.safe_load((folder / "resumed-1.yaml").read_text())
    assert changed == {"trainer": {"max_steps": -1}}
    assert "max_steps: 8" in (folder / "config.yaml").read_text()
    # The run is finished now. Resuming it again changes nothing.
    code, out, err = main("fit", "--resume", "runs/lenet/0")
    assert code == 0, err
    assert "changed" not in out and not (folder / "resumed-2.yaml").exists()
    assert list(kills.differences(kills.outcome(folder), other)) == []


def test_a_run_that_early_stopping_ended_does_not_train_further(main, tmp_path):
    stops = (
        "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping",
        *("--trainer.callbacks.monitor", "val_acc", "--trainer.callbacks.mode", "max"),
        *("--trainer.callbacks.patience", 1),
        *("--trainer.max_epochs", 5, "--trainer.limit_train_batches", 3),
    )
    assert main("fit", *SHORT, *stops)[0] == 0
    epochs = result_of(tmp_path / "runs/lenet/0")["epochs"]
    assert epochs < 5
    assert main("fit", "--resume", "runs/lenet/0")[0] == 0
    assert result_of(tmp_path / "runs/lenet/0")["epochs"] == epochs


def test_a_worse_checkpoint_does_not_replace_the_best_one_of_a_moved_folder(main, tmp_path):
    assert main("fit", *SHORT)[0] == 0
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
    ("settings", "message"),
    [
        (("--seed_everything", 1), "--seed_everything was 0 when the run started and is now 1"),
        (("--data.val_images", 100), "--data.val_images was None"),
        (("--data.batch_size", 128), "--data.batch_size was 256"),
        (("--model.norm", "none"), "does not fit the network"),
        (
            ("--model.optimizer", "AdamW", "--model.optimizer_args", "null"),
            "The optimizer was SGD when the run started and is now AdamW",
        ),
        (
            ("--model.scheduler", "StepLR", "--model.scheduler_args", "{step_size: 2}"),
            "The scheduler was CosineAnnealingLR when the run started and is now StepLR",
        ),
        (
            ("--model.scheduler", "null"),
            "was CosineAnnealingLR when the run started and is now none",
        ),
        (("--trainer.max_steps", 4), "CosineAnnealingLR was configured for 3 steps"),
        (("--ckpt_path", "last"), "--resume and --ckpt_path cannot be used together"),
        (("--trainer.fast_dev_run", "true"), "--resume writes checkpoints to the run's folder"),
        pytest.param(
            ("--data.source", "system"), "was trained on other data", marks=needs_all_images
        ),
    ],
    ids=lambda value: str(value)[:20],
)
def test_settings_that_do_not_fit_the_run_are_refused_and_its_folder_is_unchanged(
    within_an_epoch, settings, message
):
    folder = within_an_epoch / "runs/lenet/0"
    before = content_of(folder)
    done = run_here("fit", "--resume", folder, *settings, cwd=within_an_epoch, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert content_of(folder) == before


@pytest.fixture(scope="module")
def within_an_epoch(tmp_path_factory):
    """The working directory of a run that ended within an epoch. No test may change it."""
    cwd = tmp_path_factory.mktemp("within-an-epoch")
    run_here("fit", *QUICK, *COSINE, "--trainer.max_steps", 3, cwd=cwd)
    return cwd


def test_the_batch_size_may_change_between_epochs(main, tmp_path):
    brief = ("--trainer.limit_val_batches", 1, "--trainer.limit_test_batches", 1)
    brief += ("--monitor", "false", "--trainer.logger", "false")
    assert main("fit", *QUICK, *brief, "--data.batch_size", 1_000)[0] == 0
    settings = ("--data.batch_size", 500, "--trainer.max_epochs", 3)
    code, out, err = main("fit", "--resume", "runs/lenet/0", *settings)
    assert code == 0, err
    assert "changed: --data.batch_size 500 (was 1000)" in out
    assert result_of(tmp_path / "runs/lenet/0")["steps"] == 12 + 11


@pytest.mark.slow
def test_max_time_stops_within_an_epoch_and_tests_the_network(main, uninterrupted, tmp_path):
    code, out, err = main("fit", *QUICK, "--trainer.max_time", str({"milliseconds": 250}))
    assert code == 0, err
    assert "Stopped by --trainer.max_time after step" in out
    assert "test acc" in out
    assert main("fit", "--resume", "runs/lenet/0", "--trainer.max_time", "null")[0] == 0
    one, other = uninterrupted(*QUICK), kills.outcome(tmp_path / "runs/lenet/0")
    # The stopped run was also tested in the middle.
    found = kills.differences(one, other)
    assert [it for it in found if not it.startswith("/curves/test_acc")] == []


def test_a_callback_and_a_plugin_are_enough_to_resume_exactly_in_python(tmp_path):
    class Fail(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 9:
                raise InterruptedError

    def fit(where, *callbacks, ckpt_path=None):
        pl.seed_everything(0)
        trainer = pl.Trainer(
            max_epochs=2,
            limit_train_batches=6,
            accelerator="cpu",
            default_root_dir=tmp_path / where,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[*callbacks, ExactResume(every_n_train_steps=4)],
            plugins=[WholeCheckpointIO()],
        )
        data = FashionMNIST("sample", batch_size=100, flip=True)
        trainer.fit(Classifier(), data, ckpt_path=ckpt_path, weights_only=True)
        return torch.load(tmp_path / where / "checkpoints/last.ckpt", weights_only=True)

    truth = fit("uninterrupted")
    with pytest.raises(InterruptedError):
        fit("failed", Fail())
    again = fit("failed", ckpt_path=tmp_path / "failed/checkpoints/last.ckpt")
    for name in ("state_dict", "optimizer_states", "global_step"):
        assert list(kills.differences(truth[name], again[name])) == []


def test_a_resumed_run_logs_each_step_exactly_once(main, tmp_path):
    every = (*SHORT, "--trainer.log_every_n_steps", 1)
    assert main("fit", *every, "--trainer.max_steps", 8)[0] == 0
    # With a limit of 3 steps, nothing is left to do.
    for steps in (3, -1):
        assert main("fit", "--resume", "runs/lenet/0", "--trainer.max_steps", steps)[0] == 0
    events = events_in(tmp_path / "runs/lenet/0")
    assert [event.step for event in events.Scalars("train_loss")] == list(range(12))


@pytest.mark.slow
@pytest.mark.timeout(900)  # eight or more runs
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(("--kills", "2", "--writing", "1"), id="1"),
        pytest.param(("--kills", "1", "--processes", "2"), id="2"),
        # With this seed, the first run is killed twice.
        pytest.param(("--kills", "1", "--pictures", "--seed", "5"), id="pictures"),
    ],
)
def test_killed_runs_resume_bit_identically(tmp_path, settings):
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.kills", *settings, "--folder", tmp_path],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# Training loaders that cannot be resumed within an epoch, such as a plain DataLoader

PLAIN = "tests.support.plain_loader:EXPERIMENT"
LAST = Path("runs/plain/0/checkpoints/last.ckpt")


class Watch(pl.Callback):
    """Records the step of last.ckpt at each batch, and requests a stop at the step `stop_at`."""

    def __init__(self, stop_at=None):
        self.stop_at = stop_at
        self.saved = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        resume = next(c for c in trainer.callbacks if isinstance(c, ExactResume))
        self.saved.append(torch.load(resume.path, weights_only=True)["global_step"])
        if trainer.global_step == self.stop_at:
            resume.stop_requests._reason = signal.SIGTERM


def plain_fit(*settings, reference=PLAIN, stop_at=None):
    """Run fit in this process, and return the step of last.ckpt at each batch."""
    watch = Watch(stop_at)
    run.command_line(["fit", *map(str, settings)], reference, callbacks=[watch])
    return watch.saved


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_plain_loader_is_saved_between_epochs_only(here, capsys):
    saved = plain_fit("--checkpoint.every_n_train_steps", 3)
    assert saved == [0] * 10 + [10] * 10
    assert torch.load(LAST, weights_only=True)["global_step"] == 20
    out = capsys.readouterr().out
    assert (
        out.count(
            "The training loader (DataLoader) cannot be resumed within an epoch. last.ckpt is"
        )
        == 1
    )
    result = result_of(LAST.parent.parent)
    assert (result["steps"], result["finished"]) == (20, True)


def test_a_finished_run_with_a_plain_loader_resumes_at_the_end_of_its_last_epoch(here, capsys):
    plain_fit()
    saved = plain_fit("--resume", "runs/plain/0", "--trainer.max_epochs", 3)
    assert saved == [20] * 10
    assert "Resuming from step 20 (runs/plain/0/checkpoints/last.ckpt)" in capsys.readouterr().out
    result = result_of(LAST.parent.parent)
    assert (result["steps"], result["epochs"], result["resumed_at_steps"]) == (30, 3, "20")


@pytest.mark.parametrize(("step", "saved"), [(4, 0), (14, 10)])
def test_a_stopped_run_with_a_plain_loader_resumes_at_the_end_of_an_epoch(
    here, capsys, step, saved
):
    with pytest.raises(Stopped) as stopped:
        plain_fit(stop_at=step)
    assert stopped.value.code == 128 + signal.SIGTERM
    out = capsys.readouterr().out
    assert (
        f"Stopped by SIGTERM after step {step + 1}; progress up to step {saved} is saved in" in out
    )
    assert torch.load(LAST, weights_only=True)["global_step"] == saved
    result = result_of(LAST.parent.parent)
    assert (result["steps"], result["finished"]) == (step + 1, False)
    plain_fit("--resume", "runs/plain/0")
    result = result_of(LAST.parent.parent)
    assert (result["steps"], result["resumed_at_steps"]) == (20, str(saved))


def test_a_loader_without_a_length_resumes_at_the_end_of_its_last_epoch(here):
    stream = "tests.support.plain_loader:STREAM"
    assert plain_fit(reference=stream) == [0] * 10 + [10] * 10
    plain_fit("--resume", "runs/stream/0", "--trainer.max_epochs", 3, reference=stream)
    result = result_of(Path("runs/stream/0"))
    assert (result["steps"], result["epochs"]) == (30, 3)


class Line(pl.LightningModule):
    """A LightningModule that is not a Task."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def fit_line(folder, epochs, ckpt_path=None, module=None, resume=None, loader=None):
    """Train a module on a plain DataLoader. Without shuffling, a resumed run is the same."""
    module = module or Line()
    trainer = pl.Trainer(
        max_epochs=epochs,
        **QUIET,
        default_root_dir=folder,
        callbacks=[resume or ExactResume()],
        plugins=[WholeCheckpointIO()],
    )
    trainer.fit(
        module, loader or DataLoader(rows_of_a_line(), 8), ckpt_path=ckpt_path, weights_only=True
    )
    return module.layer.weight.item()


def global_step_of(folder):
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"]


def test_any_module_with_any_loader_is_saved_and_resumed(tmp_path, capsys):
    uninterrupted = fit_line(tmp_path, 3)
    assert "(DataLoader) cannot be resumed within an epoch" in capsys.readouterr().out
    fit_line(tmp_path, 1)
    assert fit_line(tmp_path, 3, tmp_path / "checkpoints/last.ckpt") == uninterrupted
    assert global_step_of(tmp_path) == 15


def test_an_exact_loader_without_a_trainer_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no trainer.*\n.*trainer=self.trainer"):
        fit_line(tmp_path, 1, loader=ExactDataLoader(rows_of_a_line(), 8, shuffle=True))


class Noisy(Dataset):
    """Adds noise from all global generators to each sample."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        x = torch.tensor([index / 40 + random.random() + np.random.random()])
        return x, 2 * x + torch.rand(1)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_plain_loader_with_random_numbers_is_resumed_bit_identically(tmp_path, num_workers):
    def fit(folder, epochs, ckpt_path=None):
        # The state of the global generators at the start of a process is of no importance.
        torch.rand(epochs)
        loader = DataLoader(Noisy(), 8, shuffle=True, num_workers=num_workers)
        return fit_line(folder, epochs, ckpt_path, loader=loader)

    whole = fit(tmp_path / "whole", 3)
    fit(tmp_path / "parts", 1)
    last = tmp_path / "parts/checkpoints/last.ckpt"
    fit(tmp_path / "parts", 2, last)
    assert fit(tmp_path / "parts", 3, last) == whole


def test_an_augmentation_with_global_random_numbers_is_resumed_bit_identically(tmp_path):
    class Augmented(Points):
        def augmentation(self, epoch):
            return lambda samples, indices: samples + torch.rand(len(samples), 1)

    whole = fit_measured(tmp_path / "whole", -1, data=Augmented(batch_size=8))
    fit_measured(tmp_path / "parts", 8, data=Augmented(batch_size=8))
    last = tmp_path / "parts/checkpoints/last.ckpt"
    assert fit_measured(tmp_path / "parts", -1, last, Augmented(batch_size=8)) == whole


class Skips(Line):
    """Skips every second batch."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) if batch_idx % 2 == 0 else None


class Manual(Line):
    """Optimizes manually, and returns no loss or a dict without a loss."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.mse_loss(self.layer(batch[0]), batch[1]))
        optimizer.step()
        return {"rows": len(batch[0])} if batch_idx % 2 else None


@pytest.mark.parametrize("module", [Skips, Manual])
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_steps_without_a_loss_are_saved_and_resumed(tmp_path, module):
    uninterrupted = fit_line(tmp_path, 3, module=module())
    fit_line(tmp_path, 1, module=module())
    last = tmp_path / "checkpoints/last.ckpt"
    assert fit_line(tmp_path, 3, last, module=module()) == uninterrupted
    assert global_step_of(tmp_path) == 15


class Measured(Line):
    """Has metrics that are not those of a Task, and averages that Lightning accumulates."""

    def __init__(self):
        super().__init__()
        self.measured = nn.ModuleDict({"of_train": MetricCollection([MeanMetric(), MaxMetric()])})

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.measured["of_train"].update(loss.detach())
        self.log("mean", loss, on_epoch=True, on_step=True, batch_size=1 + batch_idx)
        self.log("largest", loss, on_epoch=True, on_step=False, reduce_fx="max")
        self.log("total", loss, on_epoch=True, on_step=False, reduce_fx="sum")
        if batch_idx % 2:
            self.log("every_second", loss, on_epoch=True, on_step=False)
        return loss

    def on_train_epoch_end(self):
        self.log_dict(self.measured["of_train"].compute())
        self.measured["of_train"].reset()


class Points(DataModule):
    def train_dataloader(self):
        x = torch.linspace(0, 1, 40).unsqueeze(1)
        return self.train_batches(x, 2 * x, torch.arange(40))


def fit_measured(folder, max_steps, ckpt_path=None, data=None):
    """Train for two epochs of 5 steps, and return the metrics and the weight."""
    module = Measured()
    trainer = pl.Trainer(
        max_epochs=2,
        max_steps=max_steps,
        **QUIET,
        default_root_dir=folder,
        callbacks=[ExactResume()],
    )
    data = data or Points(batch_size=8)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return {**trainer.callback_metrics, "weight": module.layer.weight.item()}


def test_metrics_of_any_module_are_restored_within_an_epoch(tmp_path):
    whole = fit_measured(tmp_path / "whole", -1)
    fit_measured(tmp_path / "parts", 8)
    resumed = fit_measured(tmp_path / "parts", -1, tmp_path / "parts/checkpoints/last.ckpt")
    logged = {"mean", "mean_step", "mean_epoch", "largest", "total", "every_second"}
    assert whole.keys() == {"MeanMetric", "MaxMetric", "weight"} | logged
    assert resumed == whole


def test_the_callback_can_be_used_for_a_second_fit(tmp_path):
    resume = ExactResume()
    fit_line(tmp_path / "first", 3, resume=resume)
    alone = fit_line(tmp_path / "alone", 2)
    assert fit_line(tmp_path / "second", 2, resume=resume) == alone
    assert global_step_of(tmp_path / "second") == 10


def test_an_exact_loader_causes_no_message(trained):
    assert "cannot be resumed within an epoch" not in trained[1]
