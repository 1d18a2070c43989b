"""fit, test and validate from the outside: what people type, what they see, what is left."""

import sys

import lightning.pytorch as pl
import pytest
import yaml

from bn_lightning import cli
from bn_lightning.data.fashion_mnist import CLASSES
from bn_lightning.errors import RunFailed
from bn_lightning.runs import run
from tests.conftest import QUICK, assert_same_weights, command
from tests.support.runs import in_namespaces, result_of

FRIEDMAN = "tests.projects.friedman.experiment:EXPERIMENT"


def test_a_run_leaves_these_files(trained):
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


def test_config_is_whole(trained):
    config = yaml.safe_load((trained[0] / "config.yaml").read_text())
    assert config["model"]["norm"] == "custom"
    assert config["data"]["source"] == "sample"
    assert config["seed_everything"] == 0


def test_config_reruns_the_run_bit_for_bit(trained, tmp_path):
    folder, _ = trained
    command("fit", "--config", folder / "config.yaml", cwd=tmp_path)
    again = tmp_path / "runs" / "lenet" / "0"
    assert_same_weights(folder / "checkpoints" / "last.ckpt", again / "checkpoints" / "last.ckpt")
    measured = ("images_per_second", "train_seconds", "commit")
    one, other = (
        {k: v for k, v in result_of(f).items() if k not in measured} for f in (folder, again)
    )
    assert one == other


def test_test_needs_nothing_but_the_checkpoint(trained, main):
    folder, _ = trained
    best = folder / "checkpoints" / "best.ckpt"
    code, out, _ = main("test", "--ckpt_path", best, "--trainer.accelerator", "cpu")
    assert code == 0
    test_acc = result_of(folder)["test_acc"]
    assert out.splitlines()[1].split() == ["test_acc", f"{test_acc:.4f}"]
    _, *classes = out[out.index("class  ") :].splitlines()
    assert [line[:11].strip() for line in classes] == list(CLASSES)
    accuracies = [float(line[11:].split()[0]) for line in classes]
    assert sum(accuracies) / 10 == pytest.approx(test_acc, abs=1e-3)  # as many images in each


def test_validate(trained, main):
    folder, _ = trained
    code, out, _ = main("validate", "--ckpt_path", folder / "checkpoints" / "best.ckpt")
    assert code == 0
    assert f"{result_of(folder)['val_acc']:.4f}" in out


def test_where_nothing_is_written_for_tensorboard_nothing_points_to_it(main):
    for flags in (("--trainer.logger", "false"), ("--trainer.fast_dev_run", "true")):
        code, out, _ = main("fit", *QUICK, *flags)
        assert code == 0 and "tensorboard" not in out


def test_without_validation_images_nothing_is_selected(main, tmp_path):
    code, out, _ = main("fit", *QUICK, "--data.val_images", 0)
    assert code == 0
    assert "of the test set, and selects nothing" in out
    assert "val acc" not in out
    assert "test acc after each epoch: final" in out
    folder = tmp_path / "runs" / "lenet" / "0"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["last.ckpt"]
    found = result_of(folder)
    assert found["val_acc"] == found["test_acc"] == found["val_acc_final"]
    assert found["val_images_from"] == "test set"


# What cannot be run


def test_a_network_that_does_not_fit_the_checkpoint(main, trained):
    best = trained[0] / "checkpoints" / "best.ckpt"
    code, _, err = main("test", "--ckpt_path", best, "--model.norm", "none")
    assert code == 2
    assert "does not fit the network" in err
    assert "Traceback" not in err


def test_no_folder_for_the_run(main, tmp_path):
    (tmp_path / "runs").write_text("a file")
    code, _, err = main("fit", *QUICK)
    assert code == 2
    assert "runs" in err
    assert "--trainer.default_root_dir" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [("ro", "Read-only file system"), ("size=4k", "No space left on device")],
)
def test_no_room_for_a_run(tmp_path, options, said):
    (tmp_path / "runs").mkdir()
    fit = f"{sys.executable} -m bn_lightning fit {' '.join(QUICK)}"
    script = f"mount -t tmpfs -o {options} none runs && {fit}"
    done = in_namespaces(("--mount",), script, tmp_path)
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="another compiler there")
def test_without_a_compiler_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    done = command("fit", *QUICK, "--model.compile", "true", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "C++ compiler" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs/lenet/0").exists()


# A run that fails


class Fails(pl.Callback):
    """Raises at one step, or before the first."""

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


def test_a_run_that_has_trained_nothing_leaves_nothing(here):
    with pytest.raises(ZeroDivisionError):
        fit(callback=Fails(ZeroDivisionError()))
    assert list(here.glob("runs/friedman/*")) == []
    full = OSError(28, "No space left on device")
    with pytest.raises(RunFailed) as failed:
        fit(callback=Fails(full))
    assert str(failed.value).endswith("Nothing was trained yet, and nothing is left.")
    assert list(here.glob("runs/friedman/*")) == []


def test_a_run_that_cannot_continue_says_how_to_resume(here):
    full = OSError(28, "No space left on device")
    with pytest.raises(RunFailed) as failed:
        fit(callback=Fails(full, step=3))
    assert str(failed.value) == (
        "The run in runs/friedman/0 cannot continue: [Errno 28] No space left on device.\n"
        "When the cause is removed: fit --resume runs/friedman/0"
    )
    assert (here / "runs/friedman/0/checkpoints/last.ckpt").is_file()
    fit("--resume", "runs/friedman/0", callback=pl.Callback())
    assert result_of(here / "runs/friedman/0")["finished"]


def test_a_mistake_in_a_program_keeps_its_traceback(here):
    with pytest.raises(ZeroDivisionError):
        fit(callback=Fails(ZeroDivisionError(), step=3))
    assert (here / "runs/friedman/0/checkpoints/last.ckpt").is_file()


def test_a_rehearsal_builds_everything_and_leaves_nothing(here):
    built = run.command_line(["fit", *QUICK], cli.EXPERIMENT, run.Rehearsal)
    assert built.trainer.max_epochs == 2
    assert built.as_plain_data(built.config.fit)["data"]["source"] == "sample"
    assert built.defaults().trainer.max_epochs == 10
    assert list(here.iterdir()) == []
