"""Downloads from mirrors on this machine, good and bad ones."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from bn_lightning.data import files, sources
from tests.support.mirror import lay_out, left

pytestmark = pytest.mark.usefixtures("small")


def test_download(tmp_path, mirror):
    server = mirror()
    images = sources.load("download", tmp_path, [server.url])
    assert images.source == "download"
    assert left(tmp_path) == sorted(f"{file.name}.gz" for file in files.SAMPLED)
    asked = len(server.asked)
    sources.load("download", tmp_path, [server.url])
    assert len(server.asked) == asked  # what is there is not fetched again


@pytest.mark.parametrize("how", ["truncated", "wrong", "404", "silent", "stalls"])
def test_a_bad_mirror_leaves_nothing_and_the_second_one_serves(tmp_path, mirror, how):
    bad = mirror(how)
    with pytest.raises(files.DataError, match=f"127.0.0.1:{bad.server_port}"):
        sources.load("download", tmp_path, [bad.url])
    assert left(tmp_path) == []
    images = sources.load("download", tmp_path, [bad.url, mirror().url])
    assert len(images.train_labels) == 6_000
    assert left(tmp_path) == sorted(f"{file.name}.gz" for file in files.SAMPLED)


@pytest.mark.parametrize("layout", files.LAYOUTS)
def test_a_broken_file_in_root_is_made_good(tmp_path, mirror, layout):
    target = lay_out(tmp_path, layout, raw=True)
    (target / files.TRAIN_LABELS).write_bytes(b"half")
    server = mirror()
    sources.load("download", tmp_path, [server.url])
    asked = len(server.asked)
    sources.load("download", tmp_path, [server.url])
    assert len(server.asked) == asked  # the good file is found from now on


def test_two_downloads_at_once(tmp_path, mirror):
    urls = [mirror().url]
    with ThreadPoolExecutor(4) as pool:
        loads = list(pool.map(lambda _: sources.load("download", tmp_path, urls), range(4)))
    assert all(len(images.test_labels) == 1_000 for images in loads)
    assert left(tmp_path) == sorted(f"{file.name}.gz" for file in files.SAMPLED)
