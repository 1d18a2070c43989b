"""torchvision's data sets in their own file formats, with few images."""

import functools
import gzip
import hashlib
import http.server
import io
import json
import pickle
import struct
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets as tv

from bn_lightning import ImageData
from bn_lightning.data import torchvision_sets
from bn_lightning.data.labelled_images import DataError
from tests.conftest import run_here

COUNTS = {"train": 120, "test": 40}


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def md5(content):
    return hashlib.md5(content).hexdigest()


def write_cifar(root, monkeypatch, dataset=tv.CIFAR10, classes=10):
    """Write CIFAR as pickles in a folder, and return images (N, 3, 32, 32) and labels."""
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)
    key = "labels" if classes == 10 else "fine_labels"
    parts = {}
    for part, lists in (("train", dataset.train_list), ("test", dataset.test_list)):
        count = COUNTS[part] // len(lists)
        arrays = []
        for number, (name, _) in enumerate(lists):
            images = pixels(count, 3, 32, 32, seed=len(arrays))
            labels = ((np.arange(count) + number) % classes).tolist()
            content = pickle.dumps({"data": images.reshape(count, -1), key: labels})
            (folder / name).write_bytes(content)
            arrays.append((images, labels))
        parts[part] = tuple(map(np.concatenate, zip(*arrays, strict=True)))
    names = [f"class {number}" for number in range(classes)]
    meta = dict(dataset.meta)
    (folder / meta["filename"]).write_bytes(pickle.dumps({meta["key"]: names}))
    for attribute in ("train_list", "test_list"):
        lists = [[n, md5((folder / n).read_bytes())] for n, _ in getattr(dataset, attribute)]
        monkeypatch.setattr(dataset, attribute, lists)
    meta["md5"] = md5((folder / meta["filename"]).read_bytes())
    monkeypatch.setattr(dataset, "meta", meta)
    return parts, names


def write_mnist(root, monkeypatch, dataset=tv.MNIST):
    """Write MNIST as idx files, and return images (N, 28, 28) and labels."""
    folder = root / dataset.__name__ / "raw"
    folder.mkdir(parents=True)
    parts = {}
    for part, prefix in (("train", "train"), ("test", "t10k")):
        count = COUNTS[part]
        images, labels = pixels(count, 28, 28), np.arange(count, dtype=np.uint8) % 10
        content = struct.pack(">IIII", 0x803, count, 28, 28) + images.tobytes()
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(content)
        content = struct.pack(">II", 0x801, count) + labels.tobytes()
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(content)
        parts[part] = images, labels
    return parts, dataset.classes


def write_svhn(root, monkeypatch):
    """Write SVHN as .mat files, and return images (N, 3, 32, 32) and labels."""
    scipy_io = pytest.importorskip("scipy.io")
    root.mkdir(parents=True, exist_ok=True)
    parts, split_list = {}, {}
    for part, count in COUNTS.items():
        images, labels = pixels(32, 32, 3, count), np.arange(count, dtype=np.uint8) % 10 + 1
        path = root / f"{part}_32x32.mat"
        scipy_io.savemat(path, {"X": images, "y": labels[:, None]})
        split_list[part] = [f"http://127.0.0.1:9/{path.name}", path.name, md5(path.read_bytes())]
        # The label 10 stands for the digit 0.
        parts[part] = images.transpose(3, 2, 0, 1), labels % 10
    monkeypatch.setattr(tv.SVHN, "split_list", split_list)
    return parts, list("0123456789")


WRITE = {
    "mnist": write_mnist,
    "kmnist": functools.partial(write_mnist, dataset=tv.KMNIST),
    "cifar10": write_cifar,
    "cifar100": functools.partial(write_cifar, dataset=tv.CIFAR100, classes=100),
    "svhn": write_svhn,
}


@pytest.mark.parametrize("name", WRITE)
def test_each_set_is_read_in_its_own_format(tmp_path, monkeypatch, name):
    parts, names = WRITE[name](tmp_path, monkeypatch)
    data = ImageData(name, root=str(tmp_path), normalize=True)
    before = data.in_channels, data.image_size, data.num_classes
    data.prepare_data()
    data.setup("fit")
    for part, (images, labels) in parts.items():
        assert np.array_equal(getattr(data.images, f"{part}_images"), images)
        assert np.array_equal(getattr(data.images, f"{part}_labels"), labels)
    assert (data.in_channels, data.image_size, data.num_classes) == before
    assert list(data.classes) == list(names)
    axes = (0, 2, 3) if data.in_channels == 3 else (0, 1, 2)
    mean = np.atleast_1d((parts["train"][0] / 255).mean(axes))
    np.testing.assert_allclose(data.facts.mean, mean, rtol=1e-12)
    assert data.identity()["source"] == name
    assert f"{name} from {tmp_path}: 120 training and 40 test images" in data.describe()


@pytest.mark.parametrize(
    ("name", "norm"),
    [("mnist", "builtin"), ("cifar10", "custom"), ("cifar10", "builtin"), ("svhn", "custom")],
)
def test_a_set_trains(tmp_path, monkeypatch, name, norm):
    _, names = WRITE[name](tmp_path / "data", monkeypatch)
    network = ("--model.network", "resnet", "--model.network_args.depth", 8)
    flags = ("--model.network_args.width", 4, "--trainer.max_steps", 2, "--monitor", "false")
    chosen = ("--data.dataset", name, "--model.norm", norm)
    done = run_here("fit", *chosen, *network, *flags, cwd=tmp_path)
    assert f"{name} from data: 120 training" in done.stdout
    assert f"{names[3]} " in done.stdout  # in the table of classes
    result = json.loads((tmp_path / "runs/lenet/0/result.json").read_text())
    assert (result["steps"], result["data_source"]) == (2, name)
    saved = torch.load(tmp_path / "runs/lenet/0/checkpoints/last.ckpt", weights_only=True)
    facts = saved["datamodule_hyper_parameters"]["facts"]
    assert facts["in_channels"] == (1 if name == "mnist" else 3)
    assert list(facts["classes"]) == list(names) and len(facts["mean"]) == facts["in_channels"]


# Downloads


@pytest.fixture
def server(tmp_path):
    """Serve the folder `server` on this machine, and return its URL and the paths requested."""
    folder = tmp_path / "server"
    folder.mkdir()
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            super().do_GET()

        def log_message(self, *arguments):
            pass

    handler = functools.partial(Handler, directory=folder)
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=functools.partial(running.serve_forever, 0.01), daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/", folder, requests
    running.shutdown()
    running.server_close()


def serve_mnist(server, tmp_path, monkeypatch):
    """Move the files of a small MNIST to the server."""
    url, folder, requests = server
    write_mnist(tmp_path / "made", monkeypatch)
    resources = []
    for path in sorted((tmp_path / "made/MNIST/raw").iterdir()):
        content = gzip.compress(path.read_bytes())
        (folder / f"{path.name}.gz").write_bytes(content)
        resources.append((f"{path.name}.gz", md5(content)))
    monkeypatch.setattr(tv.MNIST, "resources", resources)
    monkeypatch.setattr(tv.MNIST, "mirrors", [url])
    return folder, requests


def files_in(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_a_set_is_downloaded_once(server, tmp_path, monkeypatch, capsys):
    _, requests = serve_mnist(server, tmp_path, monkeypatch)
    root = tmp_path / "data"
    images = torchvision_sets.load("mnist", root)
    assert "downloading mnist" in capsys.readouterr().err
    made = files_in(tmp_path / "made")
    assert len(images.train_labels) == 120 and files_in(root) == made | {".lock"}
    count = len(requests)
    torchvision_sets.load("mnist", root)
    assert len(requests) == count
    # torchvision would accept this file, since it checks only that it exists.
    path = root / "MNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:50_000])
    again = torchvision_sets.load("mnist", root)
    assert again.sha256 == images.sha256 and len(requests) > count


def test_an_interrupted_download_leaves_no_file(server, tmp_path, monkeypatch):
    folder, _ = serve_mnist(server, tmp_path, monkeypatch)
    path = folder / "train-labels-idx1-ubyte.gz"
    content = path.read_bytes()
    path.write_bytes(content[:20])
    root = tmp_path / "data"
    with pytest.raises(DataError, match=r"(?s)cannot be read or downloaded.*train-labels") as error:
        torchvision_sets.load("mnist", root)
    assert f"{root}/MNIST/raw/t10k-labels-idx1-ubyte" in str(error.value)
    assert "--data.root FOLDER" in str(error.value) and len(str(error.value).splitlines()) < 20
    assert files_in(root) == {".lock"}
    # An error while it unpacks.
    path.write_bytes(content)
    monkeypatch.setattr(tv.mnist, "read_label_file", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        torchvision_sets.load("mnist", root)
    assert files_in(root) == {".lock"}
    monkeypatch.undo()
    serve_mnist(server, tmp_path / "again", monkeypatch)
    assert len(torchvision_sets.load("mnist", root).train_labels) == 120


def test_an_archive_is_unpacked_and_verified(server, tmp_path, monkeypatch):
    url, folder, _ = server
    write_cifar(tmp_path / "made", monkeypatch)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.add(tmp_path / "made/cifar-10-batches-py", "cifar-10-batches-py")
    (folder / "a.tar.gz").write_bytes(buffer.getvalue())
    monkeypatch.setattr(tv.CIFAR10, "url", f"{url}a.tar.gz")
    monkeypatch.setattr(tv.CIFAR10, "tgz_md5", md5(buffer.getvalue()))
    root = tmp_path / "data"
    images = torchvision_sets.load("cifar10", root)
    # A changed file is replaced.
    path = root / "cifar-10-batches-py/data_batch_2"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert torchvision_sets.load("cifar10", root).sha256 == images.sha256


def test_without_network_the_expected_files_are_named(main, monkeypatch):
    monkeypatch.setattr(tv.CIFAR10, "url", "http://127.0.0.1:9/a.tar.gz")
    code, _, err = main("fit", "--data.dataset", "cifar10", "--model.network", "mlp")
    assert code == 2
    assert "The data set 'cifar10' cannot be read or downloaded" in err
    assert str(Path("data/cifar-10-batches-py/data_batch_5")) in err and "Traceback" not in err
    assert len(err.splitlines()) < 20 and not Path("runs").exists()
