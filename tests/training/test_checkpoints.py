"""Checkpoint files: written whole or not at all, and read without executing anything in them."""

import http.server
import os
import pickle
import re
import shutil
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch

from bn_lightning import UserError, WholeCheckpointIO
from bn_lightning.errors import RunFailed
from bn_lightning.training import checkpoints
from tests.conftest import QUICK
from tests.support.runs import begin, in_namespaces, result_of, wait_until_it_trains

# Reading


class Bomb:
    def __reduce__(self):
        return open, ("exploded", "w")


@pytest.fixture
def served(tmp_path):
    """A folder, and its address on loopback."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["fit", "test"])
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_bomb_is_refused_without_running(main, served, tmp_path, name, writer):
    folder, address = served
    content = {"state_dict": {}, "hyper_parameters": Bomb()}
    if writer == "torch":
        torch.save(content, folder / "bomb.ckpt")
    else:
        (folder / "bomb.ckpt").write_bytes(pickle.dumps(content))
    for path in (folder / "bomb.ckpt", f"{address}/bomb.ckpt"):
        code, _, err = main(name, "--ckpt_path", path)
        assert code == 2
        assert "nothing in it was executed" in err
    assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(content))
    assert (tmp_path / "exploded").exists()  # the bomb itself works


def test_a_checkpoint_by_address(main, trained, served):
    folder, address = served
    shutil.copy(trained[0] / "checkpoints" / "best.ckpt", folder)
    code, out, err = main("test", "--ckpt_path", f"{address}/best.ckpt")
    assert code == 0, err
    assert f"{result_of(trained[0])['test_acc']:.4f}" in out


def test_a_checkpoint_and_its_path(tmp_path):
    torch.save({"state_dict": {"w": torch.ones(2)}, "epoch": 3}, tmp_path / "x.ckpt")
    path, content = checkpoints.load(str(tmp_path / "x.ckpt"))
    assert path == str(tmp_path / "x.ckpt")
    assert content["epoch"] == 3 and torch.equal(content["state_dict"]["w"], torch.ones(2))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"hyper_parameters": {}}, "it has no 'state_dict'"),
        ({"state_dict": [1]}, "its 'state_dict' is no dict"),
        ({"state_dict": {}, "hyper_parameters": "lr"}, "its 'hyper_parameters' is no dict"),
        ([1, 2], "is no dict"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, content, said):
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=said):
        checkpoints.load(str(tmp_path / "x.ckpt"))


def test_a_folder_is_no_checkpoint_and_has_one(tmp_path):
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "checkpoints/best.ckpt"))):
        checkpoints.load(str(tmp_path))


def test_torchs_advice_to_trust_the_file_is_not_repeated(tmp_path):
    torch.save({"state_dict": {}, "x": Path("a")}, tmp_path / "x.ckpt")
    with pytest.raises(UserError) as refused:
        checkpoints.load(str(tmp_path / "x.ckpt"))
    assert "pathlib" in str(refused.value)  # what it found
    assert "weights_only" not in str(refused.value)


def test_a_checkpoint_of_another_version_is_for_testing_only(main, trained, tmp_path):
    content = torch.load(trained[0] / "checkpoints/last.ckpt", weights_only=True)
    for missing in ("train_metrics", "optimizer_states"):
        torch.save({k: v for k, v in content.items() if k != missing}, tmp_path / "old.ckpt")
        code, _, err = main("fit", "--ckpt_path", "old.ckpt")
        assert (code, "'old.ckpt' was written by another version" in err) == (2, True)
        assert main("test", "--ckpt_path", "old.ckpt")[0] == 0


# Writing


def test_a_file_is_replaced_whole(tmp_path):
    file = tmp_path / "x.ckpt"
    checkpoints.write_whole(file, b"one")
    checkpoints.write_whole(file, memoryview(b"other"))
    assert file.read_bytes() == b"other"
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    file = tmp_path / "x.ckpt"
    checkpoints.write_whole(file, b"one")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.write_whole(file, b"other")
    assert file.read_bytes() == b"one"
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]


@pytest.mark.parametrize(("there", "said"), [(True, "The one before is whole"), (False, "none")])
def test_a_full_disk_fails_the_run_and_says_what_is_left(tmp_path, monkeypatch, there, said):
    plugin, file = WholeCheckpointIO(), tmp_path / "new" / "x.ckpt"
    if there:
        plugin.save_checkpoint({"epoch": 1}, file)
        assert torch.load(file, weights_only=True) == {"epoch": 1}

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFailed) as failed:
        plugin.save_checkpoint({"epoch": 2}, file)
    assert "cannot be written: No space left on device" in str(failed.value)
    assert said in str(failed.value)
    assert not there or torch.load(file, weights_only=True) == {"epoch": 1}


def test_a_folder_that_is_gone_is_not_made_anew(tmp_path):
    """A run that someone has moved would go on in a second folder."""
    plugin = WholeCheckpointIO()
    plugin.save_checkpoint({}, tmp_path / "new" / "x.ckpt")
    shutil.move(tmp_path / "new", tmp_path / "moved")
    with pytest.raises(RunFailed, match="No such file or directory"):
        plugin.save_checkpoint({}, tmp_path / "new" / "x.ckpt")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_gone_ends_the_run(tmp_path):
    run = begin(tmp_path)
    wait_until_it_trains(run, tmp_path)
    shutil.move(tmp_path / "runs/lenet/0", tmp_path / "elsewhere")
    out, err = run.communicate(timeout=60)
    assert run.returncode == 1, out + err
    assert re.search("cannot (be written|continue): .*No such file or directory", err)
    assert "Traceback" not in err
    last = torch.load(tmp_path / "elsewhere/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"]


def test_a_full_disk_ends_the_run_with_one_message_and_the_checkpoint_before(tmp_path):
    """A disk of 4 MB that something else fills while the run goes on."""
    (tmp_path / "runs").mkdir()
    code = (
        "import lightning.pytorch as pl\n\n\nclass Fill(pl.Callback):\n"
        "    def on_train_batch_end(self, trainer, *args):\n        if trainer.global_step == 25:\n"
        "            with open('runs/filler', 'wb', buffering=0) as file:\n"
        "                try:\n"
        "                    while file.write(bytes(4096)):\n                        pass\n"
        "                except OSError:\n                    pass\n"
    )
    (tmp_path / "fill.py").write_text(code)
    script = (
        f"mount -t tmpfs -o size=4m none runs && {sys.executable} -m bn_lightning fit "
        f"{' '.join(QUICK)} --checkpoint.every_n_train_steps 10 --trainer.accelerator cpu "
        "--trainer.callbacks+=fill.Fill; code=$?; cp -r runs kept; exit $code"
    )
    done = in_namespaces(("--mount",), script, tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "cannot be written: No space left on device" in done.stderr
    assert "The one before is whole" in done.stderr
    assert "Traceback" not in done.stderr
    folder = tmp_path / "kept/lenet/0/checkpoints"
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 22
    assert not list(folder.glob(".*"))
