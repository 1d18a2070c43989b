import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import yaml

from bn_lightning import UserError
from bn_lightning.runs import folder


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
        (tmp_path / str(number) / "config.yaml").write_text("seed_everything: 0\ntrainer:\n  max_epochs: 10\n")
        for name, later in (("best", 1), ("last", 0)):
            torch.save({"state_dict": {}, "name": f"{number} {name}"}, checkpoints / f"{name}.ckpt")
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
    now = {"seed_everything": 0, "name": "other", "resume": "runs/0", "trainer": {"max_epochs": 20}}
    changed = folder.changes(run, now)
    assert changed == {"trainer.max_epochs": (10, 20)}
    assert folder.record_changes(run, changed).name == "resumed-1.yaml"
    assert folder.changes(run, now) == {}
    now["seed_everything"] = 3
    assert yaml.safe_load(folder.record_changes(run, folder.changes(run, now)).read_text()) == {"seed_everything": 3}
    assert [path.name for path in folder.settings_files(run)] == ["config.yaml", "resumed-1.yaml", "resumed-2.yaml"]
