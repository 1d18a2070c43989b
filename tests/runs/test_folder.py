"""Where runs lie: new folders, the last run, and what was changed when a run went on."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import pytest
import torch
import yaml

from bn_lightning import UserError
from bn_lightning.runs import folder
from tests.conftest import QUICK
from tests.support.runs import begin, content_of, result_of


def test_numbers_go_up_and_no_two_runs_share_a_folder(tmp_path):
    assert folder.new_folder(tmp_path / "runs" / "a").name == "0"
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: folder.new_folder(tmp_path / "runs" / "a"), range(24)))
    assert sorted(int(path.name) for path in folders) == list(range(1, 25))
    (tmp_path / "runs" / "a" / "notes").mkdir()  # something of the user's
    assert folder.new_folder(tmp_path / "runs" / "a").name == "25"


@pytest.fixture
def runs(tmp_path):
    """Three runs; in each `last.ckpt` is older than `best.ckpt`, and run 1 is the newest."""
    for number, age in ((0, 20), (1, 0), (2, 10)):
        checkpoints = tmp_path / str(number) / "checkpoints"
        checkpoints.mkdir(parents=True)
        config = tmp_path / str(number) / "config.yaml"
        config.write_text("seed_everything: 0\ntrainer:\n  max_epochs: 10\n")
        for name, later in (("best", 1), ("last", 0)):
            content = {"state_dict": {}, "name": f"{number} {name}"}
            torch.save(content, checkpoints / f"{name}.ckpt")
            os.utime(checkpoints / f"{name}.ckpt", (1_000_000 - age + later,) * 2)
    (tmp_path / "notes").mkdir()
    return tmp_path


def found(runs):
    last = folder.find_last(runs)
    return last and last[1]["name"]


def test_last_is_of_the_newest_run_that_has_a_whole_checkpoint(runs, capsys):
    assert found(runs) == "1 last"
    assert capsys.readouterr().err == ""
    for number, expected in ((1, "1 best"), (1, "2 last")):
        name = "last" if expected == "1 best" else "best"
        torn = runs / str(number) / "checkpoints" / f"{name}.ckpt"
        torn.write_bytes(torn.read_bytes()[:-100])
        os.utime(torn, (2_000_000,) * 2)
        assert found(runs) == expected
        assert f"{torn} is passed over, it is torn" in capsys.readouterr().err
    assert folder.last_of(runs / "0")[1]["name"] == "0 last"
    assert folder.find_last(runs / "nowhere") is None


def test_what_is_no_run_is_refused(runs):
    with pytest.raises(UserError, match=r"no config\.yaml"):
        folder.last_of(runs / "notes")


def test_changes_are_those_since_the_last_time(runs):
    run = runs / "0"
    trainer = {"max_epochs": 20}
    now = {"seed_everything": 0, "name": "other", "resume": "runs/0", "trainer": trainer}
    changed = folder.changes(run, now)
    assert changed == {"trainer.max_epochs": (10, 20)}
    assert folder.record_changes(run, changed).name == "resumed-1.yaml"
    assert folder.changes(run, now) == {}
    now["seed_everything"] = 3
    file = folder.record_changes(run, folder.changes(run, now))
    assert yaml.safe_load(file.read_text()) == {"seed_everything": 3}
    names = [path.name for path in folder.settings_files(run)]
    assert names == ["config.yaml", "resumed-1.yaml", "resumed-2.yaml"]


def test_a_setting_that_is_newer_than_the_run_had_its_default(runs):
    now = {"trainer": {"max_epochs": 10}, "model": {"memory_format": "auto"}}
    assert folder.changes(runs / "0", now) == {"model.memory_format": (None, "auto")}
    assert folder.changes(runs / "0", now, now) == {}
    other = {"trainer": {"max_epochs": 10}, "model": {"memory_format": "contiguous"}}
    assert folder.changes(runs / "0", other, now) == {"model.memory_format": ("auto", "contiguous")}


def test_sections_and_points_are_the_same():
    sections = {"seed": 0, "model": {"lr": 0.1, "norm_args": {"eps": 1}}}
    names = {"seed": 0, "model.lr": 0.1, "model.norm_args": {"eps": 1}}
    assert folder.flat(sections) == names
    assert folder.nested(names) == sections
    given = {"model": {"lr": 0.1}, "model.norm": "custom"}
    assert folder.nested(given) == {"model": {"lr": 0.1, "norm": "custom"}}
    assert given["model"] == {"lr": 0.1}  # as it was


def test_of_a_run_that_did_nothing_nothing_is_left(tmp_path):
    new = folder.RunFolder(folder.new_folder(tmp_path), resuming=False)
    (new.path / "config.yaml").touch()
    new.leave_nothing()
    assert not new.path.exists()
    old = folder.new_folder(tmp_path)
    (old / "config.yaml").touch()
    resumed = folder.RunFolder(old, resuming=True)
    (old / "resumed-1.yaml").touch()
    resumed.leave_nothing()
    resumed.release()
    assert sorted(path.name for path in old.iterdir()) == [".lock", "config.yaml"]


def test_a_run_goes_on_in_one_process_only(main, tmp_path):
    assert main("fit", *QUICK, "--trainer.max_steps", 3)[0] == 0
    run = tmp_path / "runs/lenet/0"
    before = content_of(run)
    with filelock.FileLock(run / ".lock"):
        code, _, err = main("fit", "--resume", "runs/lenet/0", "--trainer.max_steps", -1)
    assert (code, "is under way in another process" in err) == (2, True)
    assert content_of(run) == before


def test_a_torn_checkpoint_is_passed_over_by_name(main, tmp_path):
    settings = (
        *("--model.scheduler", "CosineAnnealingLR", "--model.optimizer_args.momentum", "0.9"),
        *("--model.lr", "0.1", "--trainer.max_steps", 30),
    )
    assert main("fit", *QUICK, *settings)[0] == 0
    last = tmp_path / "runs/lenet/0/checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:-1_000])
    code, out, err = main("fit", *QUICK, *settings, "--ckpt_path", "last")
    assert code == 0, err
    assert f"{last.relative_to(Path.cwd())} is passed over, it is torn" in err
    assert "Resuming from step 22 (runs/lenet/0/checkpoints/best.ckpt)" in out
    assert torch.load(last, weights_only=True)["global_step"] == 30
    # best.ckpt is of the end of the first epoch, whose figures are not to run into the second's.
    assert main("fit", *QUICK, *settings, "--name", "whole")[0] == 0
    results = [result_of(Path(f"runs/{name}/0")) for name in ("lenet", "whole")]
    assert results[0]["train_acc"] == results[1]["train_acc"]


def test_two_runs_that_begin_at_the_same_moment(tmp_path):
    few = ("--trainer.max_epochs", 1, "--trainer.limit_train_batches", 2)
    runs = [begin(tmp_path, *few) for _ in range(2)]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    for name in ("0", "1"):
        run = tmp_path / "runs/lenet" / name
        assert result_of(run)["finished"]
        assert len(list(run.glob("events*"))) == 1
