"""Downloads from good and faulty mirrors on this machine."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from bn_lightning.data import files, sources
from tests.support.mirror import file_names, write_files

pytestmark = pytest.mark.usefixtures("small")


def test_files_are_downloaded_once(tmp_path, mirror):
    server = mirror()
    images = sources.load("download", tmp_path, [server.url])
    assert images.source == "download"
    assert file_names(tmp_path) == sorted(f"{file.name}.gz" for file in files.SAMPLE)
    num_requests = len(server.requests)
    sources.load("download", tmp_path, [server.url])
    assert len(server.requests) == num_requests


@pytest.mark.parametrize("behaviour", ["truncated", "wrong", "404", "silent", "stalls"])
def test_a_faulty_mirror_leaves_no_file_and_the_next_one_is_used(tmp_path, mirror, behaviour):
    faulty = mirror(behaviour)
    with pytest.raises(files.DataError, match=f"127.0.0.1:{faulty.server_port}"):
        sources.load("download", tmp_path, [faulty.url])
    assert file_names(tmp_path) == []
    images = sources.load("download", tmp_path, [faulty.url, mirror().url])
    assert len(images.train_labels) == 6_000
    assert file_names(tmp_path) == sorted(f"{file.name}.gz" for file in files.SAMPLE)


@pytest.mark.parametrize("layout", files.LAYOUTS)
def test_a_corrupt_file_in_root_is_replaced(tmp_path, mirror, layout):
    target = write_files(tmp_path, layout, raw=True)
    (target / files.TRAIN_LABELS).write_bytes(b"half")
    server = mirror()
    sources.load("download", tmp_path, [server.url])
    num_requests = len(server.requests)
    sources.load("download", tmp_path, [server.url])
    assert len(server.requests) == num_requests  # now the file is valid


def test_concurrent_downloads_succeed(tmp_path, mirror):
    urls = [mirror().url]
    with ThreadPoolExecutor(4) as pool:
        loads = list(pool.map(lambda _: sources.load("download", tmp_path, urls), range(4)))
    assert all(len(images.test_labels) == 1_000 for images in loads)
    assert file_names(tmp_path) == sorted(f"{file.name}.gz" for file in files.SAMPLE)
