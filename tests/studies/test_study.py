"""Planning, locking and resuming a study."""

import json
import signal
import sys

import pytest

from bn_lightning.data import sources
from bn_lightning.errors import UserError
from bn_lightning.runs import process
from bn_lightning.studies import study, workers
from tests.conftest import PROJECTS

EXPERIMENT = "bn_lightning.experiment:EXPERIMENT"
SAMPLE = ("--data.source", "sample", "--trainer.accelerator", "cpu")


@pytest.fixture
def read(monkeypatch, tmp_path):
    """The sources and folders from which images have been read."""
    monkeypatch.chdir(tmp_path)
    process.set_up()
    found = []
    load = sources.load

    def loading(source, root, *args, **kwargs):
        found.append((source, str(root)))
        return load(source, root, *args, **kwargs)

    monkeypatch.setattr(sources, "load", loading)
    return found


def test_planning_reads_the_same_data_once_and_trains_nothing(read, tmp_path):
    one, two = (*SAMPLE, "--model.lr", "0.5"), (*SAMPLE, "--data.root", "elsewhere")
    plan = study.plan_runs(EXPERIMENT, SAMPLE, one, two, SAMPLE)
    assert read == [("sample", "data"), ("sample", "elsewhere")]
    assert [settings["model.lr"] for settings in plan.settings] == [1.0, 0.5, 1.0, 1.0]
    assert plan.root.as_posix() == "runs" and not list(tmp_path.iterdir())
    assert plan.holds_out
    # Where runs are stored does not affect their results.
    assert not {"name", "trainer.default_root_dir", "ckpt_path"} & plan.settings[0].keys()


def test_defaults_of_a_plan_are_the_defaults_of_fit(read):
    plan = study.plan_runs(EXPERIMENT, (*study.DEFAULTS, *SAMPLE, "--model.lr", "0.5"))
    [settings] = plan.settings
    differ = {name for name in settings if settings[name] != plan.defaults[name]}
    given = {"monitor", "trainer.devices", "data.source", "trainer.accelerator", "model.lr"}
    assert differ == given
    assert (plan.defaults["model.lr"], plan.defaults["trainer.max_epochs"]) == (1.0, 10)


@pytest.mark.parametrize(
    "arguments", [("--data.val_images", "0"), ("--trainer.limit_val_batches", "0")]
)
def test_a_plan_without_held_out_samples_reports_it(read, arguments):
    assert not study.plan_runs(EXPERIMENT, SAMPLE, (*SAMPLE, *arguments)).holds_out


def test_other_experiments_can_be_planned(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(PROJECTS), *sys.path])
    plan = study.plan_runs("friedman.experiment:EXPERIMENT", ("--model.width", "8"))
    assert plan.settings[0]["model.width"] == 8 and plan.holds_out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ckpt_path", "last"), "--ckpt_path cannot be used in a study"),
        (("--trainer.fast_dev_run", "true"), "--trainer.fast_dev_run and"),
        (("--trainer.enable_checkpointing", "false"), "a run writes no results"),
        (("--trainer.devices", "2"), "Each run of a study uses one process"),
        (("--trainer.default_root_dir", "there"), "stored in the same folder"),
        (("--data.source", "elsewhere"), "elsewhere"),
        (("--model.lrr", "1"), "Did you mean"),
    ],
)
def test_invalid_settings_are_refused(read, arguments, message):
    with pytest.raises(UserError) as caught:
        study.plan_runs(EXPERIMENT, SAMPLE, (*SAMPLE, *arguments))
    assert message in str(caught.value)


def test_an_invalid_combination_is_named(read):
    runs = [(*SAMPLE, "--data.resize", "8", "--model.network", name) for name in ("mlp", "lenet")]
    with pytest.raises(UserError) as caught:
        study.plan_runs(EXPERIMENT, *runs, names=["The first", "The second"])
    first, *others = str(caught.value).splitlines()
    assert first == "The second cannot be trained:" and "--data.resize" in others[-1]
    # A single run needs no name.
    with pytest.raises(UserError) as caught:
        study.plan_runs(EXPERIMENT, runs[1], names=["The only"])
    assert "The only" not in str(caught.value)
    assert read == []


def test_changed_settings_are_refused_and_listed():
    before = {"model.lr": 1.0, "gone": 1, "same": [1]}
    now = {"model.lr": 0.5, "same": [1], "new": "auto", "other": 3}
    with pytest.raises(UserError) as caught:
        study.refuse_changes("s", before, now, {"new": "auto", "other": 2, "gone": 1})
    lines = str(caught.value).splitlines()
    assert lines[0] == "The study s was started with other settings:"
    assert lines[1:-1] == [
        "    --other was 2 and is now 3",
        "    --model.lr was 1.0 and is now 0.5",
        "    --gone was 1 and is now None",
    ]
    assert "--name NAME" in lines[-1]


def test_a_new_setting_had_its_default_before():
    defaults = {"new": "auto", "data.root": "data"}
    # Defaults of settings that the study does not store are ignored.
    study.refuse_changes("s", {"a": 1}, {"a": 1, "new": "auto"}, defaults)
    with pytest.raises(UserError, match="--new was auto and is now x"):
        study.refuse_changes("s", {"a": 1}, {"a": 1, "new": "x"}, defaults)


def test_a_study_cannot_run_twice_at_the_same_time(tmp_path):
    with (
        study.locked(tmp_path / "s"),
        pytest.raises(UserError, match="is running in another process"),
        study.locked(tmp_path / "s"),
    ):
        pass
    with study.locked(tmp_path / "s"):
        pass
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"--trainer\.default_root_dir FOLDER"),
        study.locked(tmp_path / "file"),
    ):
        pass


def test_finished_and_failed_runs(tmp_path):
    assert study.finished_run(tmp_path) is None and study.failed_run(tmp_path) is None
    for number, finished in enumerate([True, False, True, False]):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "result.json").write_text(json.dumps({"finished": finished}))
    (tmp_path / "10").mkdir()
    (tmp_path / "log.txt").touch()
    assert study.finished_run(tmp_path) == tmp_path / "2"
    for number in (3, 10):
        failure = {"step": 1_000 + number, "epoch": 1, "batch": 0}
        (tmp_path / str(number) / "failure.json").write_text(json.dumps(failure))
    folder, message = study.failed_run(tmp_path)
    assert (folder.name, message) == ("10", "non-finite loss at step 1,010, epoch 2")


def test_short_names_are_unique():
    assert study.short_names(["model.lr", "a.size", "b.size", "seed"]) == {
        "model.lr": "lr",
        "a.size": "a.size",
        "b.size": "b.size",
        "seed": "seed",
    }


def test_sigterm_stops_a_study_like_ctrl_c(capsys, monkeypatch):
    class NoWorkers:
        def __init__(self, *args):
            self.count = 0

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

    monkeypatch.setattr(study.workers, "Workers", NoWorkers)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), study.start_workers(EXPERIMENT, 1, 2, 0):
        signal.raise_signal(signal.SIGTERM)
    assert "the same command resumes the study" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("is_disk_full", "attempts"), [(False, 2), (True, 1)])
def test_after_a_failure_of_the_machine_a_run_is_tried_once_more(is_disk_full, attempts):
    class Pool:
        attempts = 0

        def fit(self, *_):
            self.attempts += 1
            raise workers.MachineFailure("killed", is_disk_full)

    pool = Pool()
    with pytest.raises(workers.MachineFailure):
        study.fit(pool, [], None, None)
    assert pool.attempts == attempts


def test_something_is_printed_before_the_first_run_ends(monkeypatch, capsys):
    class NoWorkers:
        def __init__(self, *args):
            assert "[1 of 4 runs are done; training 3, 2 in parallel on the GPUs 0, 1." in (
                capsys.readouterr().out
            )

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

    monkeypatch.setattr(study.workers, "Workers", NoWorkers)
    with study.start_workers(EXPERIMENT, 2, 4, 1, ["0", "1"]):
        pass
