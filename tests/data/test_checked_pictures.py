"""The check of all pictures, and its result in a file."""

import errno
import os
import pickle
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bn_lightning.data import checked_pictures, folders, pictures
from bn_lightning.data.checked_pictures import check, mean_and_std
from bn_lightning.training.worker_processes import WorkerFailed

SIDE = 10
BROKEN = ["b/half.png", "b/text.jpg"]


@pytest.fixture
def folder(tmp_path):
    """A folder of 40 pictures that have the size of the data, and two that are broken."""
    random = np.random.default_rng(0)
    path = tmp_path / "pictures"
    for number in range(40):
        file = path / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(file)
    intact = (path / "a/0.png").read_bytes()
    (path / BROKEN[0]).write_bytes(intact[: len(intact) // 2])
    (path / BROKEN[1]).write_bytes(b"this is not a picture")
    return path


@pytest.fixture
def read(monkeypatch):
    """The names of the files that this process reads."""
    names = []
    read_as = pictures.read_as

    def noted(path, *arguments):
        names.append(path.name)
        return read_as(path, *arguments)

    monkeypatch.setattr(pictures, "read_as", noted)
    return names


def listed(folder):
    return folders.find(folder).train


def run(folder, root, channels=3, num_workers=0):
    return check(folder, listed(folder), SIDE, channels, root, num_workers)


def kept_file(root):
    (file,) = (root / "checked").glob("*.npz")
    return file


@pytest.mark.parametrize(("channels", "num_workers"), [(3, 0), (3, 2), (1, 2)])
def test_broken_pictures_and_the_sums_of_the_others(folder, tmp_path, channels, num_workers):
    part = listed(folder)
    checked = run(folder, tmp_path / "root", channels, num_workers)
    broken = {os.fsdecode(part.names[index]): reason for index, reason in checked.errors.items()}
    assert sorted(broken) == BROKEN
    assert broken["b/text.jpg"] == "not a readable image"
    assert not any("\n" in reason or str(folder) in reason for reason in broken.values())

    good = [index for index in range(42) if index not in checked.errors]
    mode = "RGB" if channels == 3 else "L"
    decoded = np.stack(
        [
            np.asarray(Image.open(folder / os.fsdecode(part.names[index])).convert(mode))
            for index in good
        ]
    ).reshape(40, SIDE * SIDE, channels)
    pixels = decoded.astype(np.int64)
    assert checked.sums.dtype == np.int64 and checked.sums.shape == (42, channels, 2)
    assert np.array_equal(checked.sums[good], np.stack([pixels.sum(1), (pixels**2).sum(1)], -1))
    assert not checked.sums[list(checked.errors)].any()
    mean, std = mean_and_std(checked.sums[good], SIDE * SIDE)
    np.testing.assert_allclose(mean, (decoded / 255).mean((0, 1)), rtol=1e-12)
    np.testing.assert_allclose(std, (decoded / 255).std((0, 1)), rtol=1e-12)


def test_only_new_changed_and_broken_pictures_are_read_again(folder, tmp_path, read, capfd):
    first = run(folder, tmp_path)
    assert len(read) == 42
    inode = kept_file(tmp_path).stat().st_ino
    read.clear()
    assert run(folder, tmp_path).errors == first.errors
    assert sorted(read) == ["half.png", "text.jpg"]
    assert kept_file(tmp_path).stat().st_ino == inode
    # A picture of another size and the same time, one of the same size and another time, and
    # a new one.
    times = {name: (folder / name).stat().st_mtime_ns for name in ("a/0.png", "a/4.png")}
    (folder / "a/0.png").write_bytes((folder / "a/2.png").read_bytes() + b"0")
    os.utime(folder / "a/0.png", ns=(times["a/0.png"],) * 2)
    os.utime(folder / "a/4.png", ns=(times["a/4.png"] + 1,) * 2)
    shutil.copyfile(folder / "a/6.png", folder / "a/+.png")
    (folder / "b/1.png").unlink()
    for path in map(folder.joinpath, BROKEN):
        path.with_suffix(".bak").write_bytes(path.read_bytes())
        path.unlink()
    shutil.copyfile(folder / "a/8.png", folder / BROKEN[0])
    shutil.copyfile(folder / BROKEN[1].replace("jpg", "bak"), folder / BROKEN[1])
    read.clear()
    second = run(folder, tmp_path)
    assert sorted(read) == ["+.png", "0.png", "4.png", "half.png", "text.jpg"]
    names = [os.fsdecode(name) for name in listed(folder).names]
    sums = dict(zip(names, second.sums.tolist(), strict=True))
    assert sums["a/0.png"] == sums["a/2.png"] and sums["a/+.png"] == sums["a/6.png"]
    assert sums["b/half.png"] == sums["a/8.png"]
    assert [names[index] for index in second.errors] == [BROKEN[1]]
    # Without the broken picture, nothing is read, and nothing is printed or written.
    (folder / BROKEN[1]).unlink()
    read.clear()
    third = run(folder, tmp_path, num_workers=2)
    assert third.errors == {} and read == []
    assert np.array_equal(third.sums, second.sums[[name != BROKEN[1] for name in names]])
    assert capfd.readouterr() == ("", "")


def test_results_belong_to_a_folder_a_size_and_a_number_of_channels(
    folder, tmp_path, read, monkeypatch
):
    part = listed(folder)
    # The parts of a folder follow each other, so the names are not in order.
    part = part.select(np.random.default_rng(0).permutation(len(part)))
    shutil.copytree(folder, tmp_path / "copy")
    for path, side, channels in (
        (folder, SIDE, 3),
        (folder, SIDE, 1),
        (folder, SIDE + 1, 3),
        (tmp_path / "copy", SIDE, 3),
    ):
        read.clear()
        check(path, part, side, channels, tmp_path, 0)
        assert len(read) == 42
    monkeypatch.chdir(folder)
    read.clear()
    check(Path(), part, SIDE, 3, tmp_path, 0)
    check(Path("../copy"), part, SIDE, 3, tmp_path, 0)
    assert sorted(set(read)) == ["half.png", "text.jpg"]


class Attack:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def foreign_contents(content):
    """Return contents of files that are not the results of a check."""
    half = len(content) // 2
    yield from (b"", b"text", content[:half], content[:-1])
    yield content[:half] + bytes(byte ^ 1 for byte in content[half : half + 40]) + content[half:]
    yield pickle.dumps(Attack())


def foreign_arrays(kept):
    names, sizes, times, sums = kept.values()
    yield {"names": names}
    yield kept | {"names": np.array([Attack()] * len(names), dtype=object)}
    yield kept | {"names": names.astype(str)}
    yield kept | {"sizes": sizes[:-1]}
    yield kept | {"times": times.astype(float)}
    yield kept | {"sums": sums[:, :2]}
    yield kept | {"names": np.array(1)}
    yield {name: array[:0] for name, array in kept.items()}


def test_a_foreign_or_damaged_file_is_replaced(folder, tmp_path, monkeypatch, read):
    monkeypatch.chdir(tmp_path)
    for name in BROKEN:
        (folder / name).unlink()
    expected = run(folder, tmp_path).sums
    file = kept_file(tmp_path)
    content = file.read_bytes()
    with np.load(file) as archive:
        kept = dict(archive)

    def assert_is_replaced():
        read.clear()
        assert np.array_equal(run(folder, tmp_path).sums, expected)
        assert len(read) == 40 and file.read_bytes() == content

    for foreign in foreign_contents(content):
        file.write_bytes(foreign)
        assert_is_replaced()
    for arrays in foreign_arrays(kept):
        np.savez(file, **arrays)
        assert_is_replaced()
    with file.open("wb") as opened:
        np.save(opened, expected)
    assert_is_replaced()
    assert not Path("executed").exists()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_interruption_keeps_what_has_been_checked(
    folder, tmp_path, monkeypatch, read, num_workers
):
    chunks = []

    def interrupt(self, n):
        chunks.append(n)
        if len(chunks) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checked_pictures.tqdm, "update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path, num_workers=num_workers)
    with np.load(kept_file(tmp_path)) as archive:
        assert len(archive["names"]) == 2 * checked_pictures.CHUNK
    read.clear()
    checked = run(folder, tmp_path)
    assert len(read) == 42 - 2 * checked_pictures.CHUNK and len(checked.errors) == 2
    assert np.array_equal(checked.sums, run(folder, tmp_path / "fresh").sums)


def test_the_result_is_saved_from_time_to_time(folder, tmp_path, monkeypatch):
    """Otherwise a run that is killed would lose hours."""
    read_as = pictures.read_as
    names = []

    def kept_before(path, *arguments):
        file = next(iter((tmp_path / "checked").glob("*.npz")), None)
        if file is not None:
            with np.load(file) as archive:
                names.append(len(archive["names"]))
        return read_as(path, *arguments)

    monkeypatch.setattr(pictures, "read_as", kept_before)
    monkeypatch.setattr(checked_pictures, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(checked_pictures, "CHUNK", 1)
    run(folder, tmp_path)
    assert names == [*range(1, 40), 40, 40]


@pytest.mark.slow
def test_a_killed_worker_ends_the_check(folder, tmp_path, monkeypatch, read):
    read_as = pictures.read_as

    def killed(path, *arguments):
        if path.name == "9.png":
            os.kill(os.getpid(), signal.SIGKILL)
        return read_as(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "read_as", killed)
        with pytest.raises(WorkerFailed, match="SIGKILL"):
            run(folder, tmp_path, num_workers=1)
    # Pictures are read in the order of their names.
    read.clear()
    run(folder, tmp_path)
    assert "9.png" in read and len(read) < 42


def test_the_reason_has_one_line_without_the_path(folder, tmp_path, monkeypatch):
    def refused(path, *arguments):
        raise pictures.PictureError(f"{path}: it is too large:\nmore than 1 pixel")

    monkeypatch.setattr(pictures, "read_as", refused)
    assert set(run(folder, tmp_path).errors.values()) == {"it is too large:"}


def test_two_checks_at_once_read_each_picture_once(folder, tmp_path, read):
    for name in BROKEN:
        (folder / name).unlink()
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(run(folder, tmp_path))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read) == 40
    assert np.array_equal(found[0].sums, found[1].sums)


def test_the_check_does_not_need_to_be_kept(folder, tmp_path, monkeypatch, capsys):
    expected = run(folder, tmp_path / "root").sums
    (tmp_path / "file").write_bytes(b"")
    assert np.array_equal(run(folder, tmp_path / "file").sums, expected)
    assert capsys.readouterr().err.splitlines() == [
        "WARNING: the next run will check all pictures again: The folder "
        f"'{tmp_path}/file/checked' for data cannot be written: Not a directory."
    ]

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checked_pictures, "write_atomically", full)
    monkeypatch.setattr(checked_pictures, "SAVE_SECONDS", 0.0)
    assert np.array_equal(run(folder, tmp_path / "full").sums, expected)
    (line,) = capsys.readouterr().err.splitlines()
    assert "check all pictures again: [Errno 28] No space left on device" in line
