"""The commands fit, test and validate: their output, files and errors."""

import sys

import lightning.pytorch as pl
import pytest
import yaml

from bn_lightning import cli
from bn_lightning.data.fashion_mnist import CLASSES
from bn_lightning.errors import RunFailed
from bn_lightning.runs import run
from tests.conftest import BRIEF, QUICK, REPOSITORY, assert_same_weights, command, run_here
from tests.support.runs import in_namespaces, result_of

FRIEDMAN = "tests.projects.friedman.experiment:EXPERIMENT"


def test_a_run_writes_these_files(trained):
    folder, _ = trained
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    events = [name for name in names if name.startswith("events.out.tfevents")]
    assert len(events) == 1
    assert sorted(set(names) - set(events)) == [
        ".lock",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "config.yaml",
        "result.json",
    ]


def test_config_has_all_settings(trained):
    config = yaml.safe_load((trained[0] / "config.yaml").read_text())
    assert config["model"]["norm"] == "custom"
    assert config["data"]["source"] == "sample"
    assert config["seed_everything"] == 0


def test_fit_with_a_runs_config_repeats_it_bit_identically(trained, tmp_path):
    folder, _ = trained
    run_here("fit", "--config", folder / "config.yaml", cwd=tmp_path)
    again = tmp_path / "runs" / "lenet" / "0"
    assert_same_weights(folder / "checkpoints" / "last.ckpt", again / "checkpoints" / "last.ckpt")
    measured = ("images_per_second", "train_seconds", "commit")
    one, other = (
        {k: v for k, v in result_of(f).items() if k not in measured} for f in (folder, again)
    )
    assert one == other


def test_test_needs_only_a_checkpoint(trained, main):
    folder, _ = trained
    best = folder / "checkpoints" / "best.ckpt"
    code, out, _ = main("test", "--ckpt_path", best, "--trainer.accelerator", "cpu")
    assert code == 0
    test_acc = result_of(folder)["test_acc"]
    assert out.splitlines()[1].split() == ["test_acc", f"{test_acc:.4f}"]
    _, *classes = out[out.index("class  ") :].splitlines()
    assert [line[:11].strip() for line in classes] == list(CLASSES)
    accuracies = [float(line[11:].split()[0]) for line in classes]
    assert sum(accuracies) / 10 == pytest.approx(test_acc, abs=1e-3)  # classes have equal sizes


def test_validate_prints_the_metrics_of_the_run(trained, main):
    folder, _ = trained
    code, out, _ = main("validate", "--ckpt_path", folder / "checkpoints" / "best.ckpt")
    assert code == 0
    assert f"{result_of(folder)['val_acc']:.4f}" in out


def test_tensorboard_is_not_mentioned_without_its_logger(main):
    for flags in (("--trainer.logger", "false"), ("--trainer.fast_dev_run", "true")):
        code, out, _ = main("fit", *BRIEF, *flags)
        assert code == 0 and "tensorboard" not in out


def test_no_checkpoint_is_selected_without_validation_images(main, tmp_path):
    code, out, _ = main("fit", *BRIEF, "--data.val_images", 0)
    assert code == 0
    assert "are computed on the test set, and no checkpoint is selected" in out
    assert "val acc" not in out
    assert "test acc after each epoch: final" in out
    folder = tmp_path / "runs" / "lenet" / "0"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["last.ckpt"]
    found = result_of(folder)
    assert found["val_acc"] == found["test_acc"] == found["val_acc_final"]
    assert found["val_images_from"] == "test set"


# Settings and files that are refused


def test_a_network_that_does_not_fit_the_checkpoint_is_refused(main, trained):
    best = trained[0] / "checkpoints" / "best.ckpt"
    code, _, err = main("test", "--ckpt_path", best, "--model.norm", "none")
    assert code == 2
    assert "does not fit the network" in err
    assert "Traceback" not in err


def test_a_folder_that_cannot_be_created_is_reported(main, tmp_path):
    (tmp_path / "runs").write_text("a file")
    code, _, err = main("fit", *QUICK)
    assert code == 2
    assert "runs" in err
    assert "--trainer.default_root_dir" in err


FIT_TWICE = """
from tests.conftest import QUICK, run_here
for folder in ("read_only", "full"):
    done = run_here(
        "fit", *QUICK, "--trainer.default_root_dir", folder, cwd={cwd!r}, check=False
    )
    print(done.returncode, repr(done.stderr))
"""


@pytest.mark.slow
def test_a_read_only_or_full_disk_is_reported(tmp_path):
    (tmp_path / "read_only").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "fit_twice.py").write_text(FIT_TWICE.format(cwd=str(tmp_path)))
    script = (
        "mount -t tmpfs -o ro none read_only && mount -t tmpfs -o size=4k none full && "
        f"PYTHONPATH={REPOSITORY} {sys.executable} fit_twice.py"
    )
    done = in_namespaces(("--mount",), script, tmp_path)
    assert done.returncode == 0, done.stderr
    messages = ("Read-only file system", "No space left on device")
    for line, message in zip(done.stdout.splitlines(), messages, strict=True):
        code, _, err = line.partition(" ")
        assert code in ("1", "2")
        assert message in err
        assert "Traceback" not in err


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has another compiler")
@pytest.mark.slow
def test_a_missing_compiler_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    done = command("fit", *QUICK, "--model.compile", "true", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "C++ compiler" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs/lenet/0").exists()


# Runs that fail


class Fails(pl.Callback):
    """Raises an error after one step, or before the first."""

    def __init__(self, error, step=None):
        self.error, self.step = error, step

    def on_train_start(self, trainer, pl_module):
        if self.step is None:
            raise self.error

    def on_train_batch_end(self, trainer, *rest):
        if trainer.global_step == self.step:
            raise self.error


def fit(*arguments, callback):
    given = ["fit", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", *arguments]
    run.command_line(given, FRIEDMAN, callbacks=[callback])


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_that_fails_before_training_leaves_no_files(here):
    with pytest.raises(ZeroDivisionError):
        fit(callback=Fails(ZeroDivisionError()))
    assert list(here.glob("runs/friedman/*")) == []
    full = OSError(28, "No space left on device")
    with pytest.raises(RunFailed) as failed:
        fit(callback=Fails(full))
    assert str(failed.value).endswith("No step was completed, and the run's folder was removed.")
    assert list(here.glob("runs/friedman/*")) == []


# `main` hides this warning; see `process.set_up`.
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_the_error_of_a_full_disk_says_how_to_resume(here):
    full = OSError(28, "No space left on device")
    with pytest.raises(RunFailed) as failed:
        fit(callback=Fails(full, step=3))
    assert str(failed.value) == (
        "The run in runs/friedman/0 cannot continue: [Errno 28] No space left on device.\n"
        "Fix the cause, then resume: fit --resume runs/friedman/0"
    )
    assert (here / "runs/friedman/0/checkpoints/last.ckpt").is_file()
    fit("--resume", "runs/friedman/0", callback=pl.Callback())
    assert result_of(here / "runs/friedman/0")["finished"]


def test_other_errors_keep_their_traceback(here):
    with pytest.raises(ZeroDivisionError):
        fit(callback=Fails(ZeroDivisionError(), step=3))
    assert (here / "runs/friedman/0/checkpoints/last.ckpt").is_file()


def test_a_rehearsal_builds_all_objects_and_writes_no_files(here):
    built = run.command_line(["fit", *QUICK], cli.EXPERIMENT, run.Rehearsal)
    assert built.trainer.max_epochs == 2
    assert built.as_plain_data(built.config.fit)["data"]["source"] == "sample"
    assert built.defaults().trainer.max_epochs == 10
    assert list(here.iterdir()) == []
