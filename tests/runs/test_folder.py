"""The folders of runs: creation, checkpoints, and changes of settings."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import pytest
import torch
import yaml

from bn_lightning import UserError
from bn_lightning.runs import folder
from tests.conftest import BRIEF
from tests.support.runs import begin, content_of, result_of


def test_new_folders_are_numbered_and_concurrent_runs_get_different_ones(tmp_path):
    assert folder.new_folder(tmp_path / "runs" / "a").name == "0"
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: folder.new_folder(tmp_path / "runs" / "a"), range(24)))
    assert sorted(int(path.name) for path in folders) == list(range(1, 25))
    (tmp_path / "runs" / "a" / "notes").mkdir()  # a folder of the user
    assert folder.new_folder(tmp_path / "runs" / "a").name == "25"


@pytest.fixture
def runs(tmp_path):
    """Return a folder with three runs. Run 1 is the newest. best.ckpt is newer than last.ckpt."""
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
    last = folder.find_newest_checkpoint(runs)
    return last and last[1]["name"]


def test_the_newest_intact_checkpoint_is_found(runs, capsys):
    assert found(runs) == "1 last"
    assert capsys.readouterr().err == ""
    for number, expected in ((1, "1 best"), (1, "2 last")):
        name = "last" if expected == "1 best" else "best"
        corrupt = runs / str(number) / "checkpoints" / f"{name}.ckpt"
        corrupt.write_bytes(corrupt.read_bytes()[:-100])
        os.utime(corrupt, (2_000_000,) * 2)
        assert found(runs) == expected
        assert f"{corrupt} is corrupt and is skipped: " in capsys.readouterr().err
    assert folder.checkpoint_to_resume(runs / "0")[1]["name"] == "0 last"
    assert folder.find_newest_checkpoint(runs / "nowhere") is None


def test_resuming_a_folder_without_a_config_is_refused(runs):
    with pytest.raises(UserError, match=r"no config\.yaml"):
        folder.checkpoint_to_resume(runs / "notes")


def test_changes_are_relative_to_the_last_resume(runs):
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


def test_flat_and_nested_settings_are_converted():
    sections = {"seed": 0, "model": {"lr": 0.1, "norm_args": {"eps": 1}}}
    names = {"seed": 0, "model.lr": 0.1, "model.norm_args": {"eps": 1}}
    assert folder.flat(sections) == names
    assert folder.nested(names) == sections
    given = {"model": {"lr": 0.1}, "model.norm": "custom"}
    assert folder.nested(given) == {"model": {"lr": 0.1, "norm": "custom"}}
    assert given["model"] == {"lr": 0.1}  # unchanged


def test_files_of_a_run_that_did_not_train_are_removed(tmp_path):
    new = folder.RunFolder(folder.new_folder(tmp_path), resuming=False)
    (new.path / "config.yaml").touch()
    new.remove_new_files()
    assert not new.path.exists()
    old = folder.new_folder(tmp_path)
    (old / "config.yaml").touch()
    # A process was killed while it wrote this file.
    (old / ".0-result.json.tmp").touch()
    resumed = folder.RunFolder(old, resuming=True)
    (old / "resumed-1.yaml").touch()
    resumed.remove_new_files()
    resumed.release()
    assert sorted(path.name for path in old.iterdir()) == [".lock", "config.yaml"]


def test_a_run_cannot_be_resumed_by_two_processes(main, tmp_path):
    assert main("fit", *BRIEF, "--trainer.max_steps", 3)[0] == 0
    run = tmp_path / "runs/lenet/0"
    before = content_of(run)
    with filelock.FileLock(run / ".lock"):
        code, _, err = main("fit", "--resume", "runs/lenet/0", "--trainer.max_steps", -1)
    assert (code, "is in use by another process" in err) == (2, True)
    assert content_of(run) == before


def test_a_corrupt_checkpoint_is_skipped_with_a_warning(main, tmp_path):
    settings = (
        *("--model.scheduler", "CosineAnnealingLR", "--model.optimizer_args.momentum", "0.9"),
        *("--model.lr", "0.1", "--trainer.max_steps", 6),
    )
    assert main("fit", *BRIEF, *settings)[0] == 0
    last = tmp_path / "runs/lenet/0/checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:-1_000])
    code, out, err = main("fit", *BRIEF, *settings, "--ckpt_path", "last")
    assert code == 0, err
    assert f"{last.relative_to(Path.cwd())} is corrupt and is skipped: " in err
    assert "Resuming from step 4 (runs/lenet/0/checkpoints/best.ckpt)" in out
    assert torch.load(last, weights_only=True)["global_step"] == 6
    # best.ckpt is from the end of the first epoch. Its metrics must not count for the second.
    assert main("fit", *BRIEF, *settings, "--name", "uninterrupted")[0] == 0
    results = [result_of(Path(f"runs/{name}/0")) for name in ("lenet", "uninterrupted")]
    assert results[0]["train_acc"] == results[1]["train_acc"]


def test_two_runs_that_start_at_the_same_time_both_finish(tmp_path):
    few = ("--trainer.max_epochs", 1, "--trainer.limit_train_batches", 2)
    runs = [begin(tmp_path, *few) for _ in range(2)]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    for name in ("0", "1"):
        run = tmp_path / "runs/lenet" / name
        assert result_of(run)["finished"]
        assert len(list(run.glob("events*"))) == 1
