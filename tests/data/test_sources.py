import gzip
import http.server
import shutil
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from bn_lightning.data import sources
from tests.conftest import needs_all_images


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """The sample stands for the whole data set, so that the network's part is fast; the system's copy is away."""
    monkeypatch.setattr(sources, "WHOLE", sources.SAMPLED)
    monkeypatch.setattr(sources, "SYSTEM", tmp_path / "no-system")
    monkeypatch.setattr(sources, "REACH_SECONDS", 1.0)
    monkeypatch.setattr(sources, "STALL_SECONDS", 1.0)


def lay_out(folder, layout, raw):
    target = folder / layout
    target.mkdir(parents=True, exist_ok=True)
    for file in sources.SAMPLED:
        packed = sources.SAMPLE / f"{file.name}.gz"
        if raw:
            (target / file.name).write_bytes(gzip.decompress(packed.read_bytes()))
        else:
            shutil.copy(packed, target)
    return target


@pytest.mark.parametrize("layout", sources.LAYOUTS)
@pytest.mark.parametrize("raw", [True, False])
def test_folder(tmp_path, layout, raw):
    lay_out(tmp_path, layout, raw)
    images = sources.load(str(tmp_path))
    assert images.source == "folder"
    assert images.train_images.shape == (6_000, 28, 28)
    assert images.train_images.dtype == torch.uint8


def test_sample_is_balanced():
    images = sources.load("sample")
    assert images.train_labels.bincount().tolist() == [600] * 10
    assert images.test_labels.bincount().tolist() == [100] * 10


@needs_all_images
def test_sample_is_the_first_of_each_class_of_the_real_data(monkeypatch):
    monkeypatch.undo()
    whole, sample = sources.load("system"), sources.load("sample")
    assert whole.train_labels.bincount().tolist() == [6_000] * 10
    for split, per_class in (("train", 600), ("test", 100)):
        images, labels = getattr(whole, f"{split}_images"), getattr(whole, f"{split}_labels")
        first = torch.cat([(labels == c).nonzero().flatten()[:per_class] for c in range(10)]).sort().values
        assert torch.equal(images[first], getattr(sample, f"{split}_images"))
        assert torch.equal(labels[first], getattr(sample, f"{split}_labels"))


def header(*shape):
    return struct.pack(f">I{len(shape)}I", 0x0800 + len(shape), *shape)


def content(file):
    return gzip.decompress((sources.SAMPLE / f"{file.name}.gz").read_bytes())


LABELS = sources.SAMPLED[1]
BROKEN = {
    "half a raw file": (lambda b: b[:3_000], "3,000 bytes"),
    "one byte too many": (lambda b: b + b"\0", "more bytes"),
    "magic number": (lambda b: b"\0\0\x08\x03" + b[4:], "0x00000803"),
    "dimensions": (lambda b: header(6_001) + b[8:], r"\(6001,\)"),
    "a label of 10": (lambda b: b[:-1] + b"\x0a", "a label 10, at index 5999"),
    "another order": (lambda b: b[:8] + b[8:][::-1], "sha256"),
    "empty": (lambda b: b"", "magic number 0x"),
}


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("raw", [True, False])
def test_a_broken_file_is_refused_by_name(tmp_path, fault, raw):
    spoil, said = BROKEN[fault]
    target = lay_out(tmp_path, "", raw)
    path = target / (LABELS.name if raw else f"{LABELS.name}.gz")
    spoiled = spoil(content(LABELS))
    path.write_bytes(spoiled if raw else gzip.compress(spoiled))
    with pytest.raises(sources.DataError, match=rf"(?s){path.name}.*found: .*{said}.*expected: "):
        sources.load(str(tmp_path))


def test_half_a_gz_file_is_refused(tmp_path):
    path = lay_out(tmp_path, "", raw=False) / f"{LABELS.name}.gz"
    path.write_bytes(path.read_bytes()[:1_000])
    with pytest.raises(sources.DataError, match="cut off or damaged"):
        sources.load(str(tmp_path))


def test_missing(tmp_path):
    with pytest.raises(sources.DataError, match="no folder"):
        sources.load(str(tmp_path / "nowhere"))
    with pytest.raises(sources.DataError, match="apt-get install dataset-fashion-mnist"):
        sources.load("system")
    lay_out(tmp_path, "", raw=True)
    (tmp_path / LABELS.name).unlink()
    with pytest.raises(sources.DataError, match=f"{LABELS.name} is missing"):
        sources.load(str(tmp_path))


class Mirror(http.server.ThreadingHTTPServer):
    """A mirror on loopback that serves the sample, or misbehaves."""

    daemon_threads = True

    def __init__(self, how="good"):
        self.how = how
        self.asked = []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/folder"
        threading.Thread(target=partial(self.serve_forever, poll_interval=0.01), daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        how = self.server.how
        self.server.asked.append(self.path)
        if how == "silent":
            time.sleep(3)
            return
        if how == "404":
            self.send_error(404)
            return
        body = (sources.SAMPLE / self.path.removeprefix("/folder/")).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if how == "truncated":
            body = body[: len(body) // 2]
        elif how == "wrong":
            body = gzip.compress(b"\0" * 5_000).ljust(len(body), b"\0")
        try:
            self.wfile.write(body[:100])
            if how == "stalls":
                time.sleep(3)
            self.wfile.write(body[100:])
        except OSError:
            pass  # the client had enough of waiting

    def log_message(self, *arguments):
        pass


@pytest.fixture
def mirror():
    servers = []

    def start(how="good"):
        servers.append(Mirror(how))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def left(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_download(tmp_path, mirror):
    server = mirror()
    images = sources.load("download", tmp_path, [server.url])
    assert images.source == "download"
    assert left(tmp_path) == sorted(f"{file.name}.gz" for file in sources.SAMPLED)
    asked = len(server.asked)
    sources.load("download", tmp_path, [server.url])
    assert len(server.asked) == asked  # what is there is not fetched again


@pytest.mark.parametrize("how", ["truncated", "wrong", "404", "silent", "stalls"])
def test_a_bad_mirror_leaves_nothing_and_the_second_one_serves(tmp_path, mirror, how):
    bad = mirror(how)
    with pytest.raises(sources.DataError, match=f"127.0.0.1:{bad.server_port}"):
        sources.load("download", tmp_path, [bad.url])
    assert left(tmp_path) == []
    images = sources.load("download", tmp_path, [bad.url, mirror().url])
    assert len(images.train_labels) == 6_000
    assert left(tmp_path) == sorted(f"{file.name}.gz" for file in sources.SAMPLED)


@pytest.mark.parametrize("layout", sources.LAYOUTS)
def test_a_broken_file_in_root_is_made_good(tmp_path, mirror, layout):
    target = lay_out(tmp_path, layout, raw=True)
    (target / LABELS.name).write_bytes(b"half")
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
    assert left(tmp_path) == sorted(f"{file.name}.gz" for file in sources.SAMPLED)


def test_auto_takes_the_first_that_is_there(tmp_path, mirror, monkeypatch, capsys):
    root, system, dead = tmp_path / "root", tmp_path / "system", ["http://127.0.0.1:9/"]
    start = time.monotonic()
    assert sources.load("auto", root, dead).source == "sample"
    assert time.monotonic() - start < 15
    assert "THIS RUN USES THE PACKAGED SAMPLE" in capsys.readouterr().err
    assert sources.load("auto", root, [mirror().url]).source == "download"
    lay_out(system, "", raw=True)
    monkeypatch.setattr(sources, "SYSTEM", system)
    assert sources.load("auto", tmp_path / "new", dead).source == "system"
    assert sources.load("auto", root, dead).source == "download"
    assert capsys.readouterr().err.count("WARNING") == 0
    (root / sources.LAYOUTS[0] / f"{LABELS.name}.gz").write_bytes(b"broken")
    assert sources.load("auto", root, dead).source == "system"
    assert "Passed over" in capsys.readouterr().err


def test_a_source_asked_for_by_name_never_falls_back(tmp_path):
    for name in ("system", "download", str(tmp_path)):
        with pytest.raises(sources.DataError):
            sources.load(name, tmp_path / "root", ["http://127.0.0.1:9/"])
