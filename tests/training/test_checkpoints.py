"""Checkpoint files: atomic writing, and loading that executes no code from the file."""

import http.server
import os
import pickle
import re
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

from bn_lightning import UserError, WholeCheckpointIO
from bn_lightning.errors import RunFailed
from bn_lightning.training import checkpoints
from tests.conftest import BRIEF, QUICK
from tests.support.runs import in_namespaces, result_of

# Reading


class Bomb:
    def __reduce__(self):
        return open, ("exploded", "w")


@pytest.fixture
def served(tmp_path):
    """A folder, and the URL at which a local HTTP server serves it."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


# torch warns about the pickle protocol before it refuses the file.
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["fit", "test"])
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_bomb_is_refused_and_not_executed(main, served, tmp_path, name, writer):
    folder, address = served
    content = {"state_dict": {}, "hyper_parameters": Bomb()}
    if writer == "torch":
        torch.save(content, folder / "bomb.ckpt")
    else:
        (folder / "bomb.ckpt").write_bytes(pickle.dumps(content))
    for path in (folder / "bomb.ckpt", f"{address}/bomb.ckpt"):
        code, _, err = main(name, "--ckpt_path", path)
        assert code == 2
        assert "Nothing in it was executed" in err
    assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(content))
    assert (tmp_path / "exploded").exists()  # the bomb works when unpickled


def test_a_checkpoint_is_loaded_from_a_url(main, trained, served):
    folder, address = served
    shutil.copy(trained[0] / "checkpoints" / "best.ckpt", folder)
    code, out, err = main("test", "--ckpt_path", f"{address}/best.ckpt")
    assert code == 0, err
    assert f"{result_of(trained[0])['test_acc']:.4f}" in out


def test_load_returns_the_path_and_the_content(tmp_path):
    torch.save({"state_dict": {"w": torch.ones(2)}, "epoch": 3}, tmp_path / "x.ckpt")
    path, content = checkpoints.load(str(tmp_path / "x.ckpt"))
    assert path == str(tmp_path / "x.ckpt")
    assert content["epoch"] == 3 and torch.equal(content["state_dict"]["w"], torch.ones(2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"hyper_parameters": {}}, "it has no 'state_dict'"),
        ({"state_dict": [1]}, "'state_dict' is not a dict"),
        ({"state_dict": {}, "hyper_parameters": "lr"}, "'hyper_parameters' is not a dict"),
        ([1, 2], "is not a dict"),
    ],
)
def test_a_file_without_the_entries_of_a_run_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=message):
        checkpoints.load(str(tmp_path / "x.ckpt"))


def test_a_folder_is_refused_with_the_path_of_its_checkpoint(tmp_path):
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "checkpoints/best.ckpt"))):
        checkpoints.load(str(tmp_path))


def test_the_message_omits_torchs_advice_to_load_unsafely(tmp_path):
    torch.save({"state_dict": {}, "x": Path("a")}, tmp_path / "x.ckpt")
    with pytest.raises(UserError) as refused:
        checkpoints.load(str(tmp_path / "x.ckpt"))
    assert "pathlib" in str(refused.value)  # the cause
    assert "weights_only" not in str(refused.value)


def test_a_checkpoint_of_another_version_can_be_tested_but_not_resumed(main, trained, tmp_path):
    content = torch.load(trained[0] / "checkpoints/last.ckpt", weights_only=True)
    del content["optimizer_states"]
    torch.save(content, tmp_path / "old.ckpt")
    code, _, err = main("fit", "--ckpt_path", "old.ckpt")
    assert (code, "'old.ckpt' was written by another version" in err) == (2, True)
    assert main("test", "--ckpt_path", "old.ckpt")[0] == 0


# Writing


def test_write_atomically_replaces_a_file_and_leaves_no_temporary_file(tmp_path):
    file = tmp_path / "x.ckpt"
    checkpoints.write_atomically(file, b"one")
    checkpoints.write_atomically(file, memoryview(b"other"))
    assert file.read_bytes() == b"other"
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]


def test_several_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    file = tmp_path / "trials.csv"

    def write(number):
        for _ in range(20):
            checkpoints.write_atomically(file, bytes([number]) * 100_000)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert len(set(file.read_bytes())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["trials.csv"]


def test_a_failed_write_leaves_the_previous_file(tmp_path, monkeypatch):
    file = tmp_path / "x.ckpt"
    checkpoints.write_atomically(file, b"one")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.write_atomically(file, b"other")
    assert file.read_bytes() == b"one"
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]


@pytest.mark.parametrize(
    ("exists", "message"),
    [(True, "The previous checkpoint is intact"), (False, "There is no previous checkpoint")],
)
def test_a_full_disk_fails_the_run_and_the_message_names_the_previous_checkpoint(
    tmp_path, monkeypatch, exists, message
):
    plugin, file = WholeCheckpointIO(), tmp_path / "new" / "x.ckpt"
    if exists:
        plugin.save_checkpoint({"epoch": 1}, file)
        assert torch.load(file, weights_only=True) == {"epoch": 1}

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFailed) as failed:
        plugin.save_checkpoint({"epoch": 2}, file)
    assert "cannot be written: No space left on device" in str(failed.value)
    assert message in str(failed.value)
    assert not exists or torch.load(file, weights_only=True) == {"epoch": 1}


def test_a_folder_that_disappeared_is_not_recreated(tmp_path):
    """If a user moves a run folder, the run must not continue in a second one."""
    plugin = WholeCheckpointIO()
    plugin.save_checkpoint({}, tmp_path / "new" / "x.ckpt")
    shutil.move(tmp_path / "new", tmp_path / "moved")
    with pytest.raises(RunFailed, match="No such file or directory"):
        plugin.save_checkpoint({}, tmp_path / "new" / "x.ckpt")
    assert not (tmp_path / "new").exists()


MOVE = """\
import shutil
import lightning.pytorch as pl


class Move(pl.Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 5:  # in the second epoch
            shutil.move("runs/lenet/0", "elsewhere")
"""


def test_a_run_folder_that_disappears_ends_the_run(main, tmp_path):
    (tmp_path / "move.py").write_text(MOVE)
    code, out, err = main("fit", *BRIEF, "--trainer.callbacks+=move.Move")
    assert code == 1, out + err
    assert re.search("cannot (be written|continue): .*No such file or directory", err)
    assert "Traceback" not in err
    last = torch.load(tmp_path / "elsewhere/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"]


# A callback that fills the disk, except 100 kB: enough for events, but not for a checkpoint.
FILL = """\
import lightning.pytorch as pl


class Fill(pl.Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 25:
            with open("runs/filler", "wb", buffering=0) as file:
                try:
                    while file.write(bytes(4096)):
                        pass
                except OSError:
                    file.truncate(file.tell() - 100_000)
"""


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_leaves_the_previous_checkpoint(tmp_path):
    """The disk has 4 MB, and something else fills it during the run."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "fill.py").write_text(FILL)
    script = (
        f"mount -t tmpfs -o size=4m none runs && {sys.executable} -m bn_lightning fit "
        f"{' '.join(QUICK)} --checkpoint.every_n_train_steps 10 --trainer.accelerator cpu "
        "--trainer.callbacks+=fill.Fill; code=$?; cp -r runs kept; exit $code"
    )
    done = in_namespaces(("--mount",), script, tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "cannot be written: No space left on device" in done.stderr
    assert "The previous checkpoint is intact" in done.stderr
    assert "Traceback" not in done.stderr
    folder = tmp_path / "kept/lenet/0/checkpoints"
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 22
    assert not list(folder.glob(".*"))
