"""Which source is taken."""

import subprocess
import sys
import time

import pytest
import torch

from bn_lightning.data import files, sources
from tests.conftest import needs_all_images, weights
from tests.support.mirror import lay_out
from tests.support.runs import result_of

pytestmark = pytest.mark.usefixtures("small")


@pytest.mark.parametrize("layout", files.LAYOUTS)
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
        first = (
            torch.cat([(labels == c).nonzero().flatten()[:per_class] for c in range(10)])
            .sort()
            .values
        )
        assert torch.equal(images[first], getattr(sample, f"{split}_images"))
        assert torch.equal(labels[first], getattr(sample, f"{split}_labels"))


def test_missing(tmp_path):
    with pytest.raises(files.DataError, match="no folder"):
        sources.load(str(tmp_path / "nowhere"))
    with pytest.raises(files.DataError, match="apt-get install dataset-fashion-mnist"):
        sources.load("system")
    lay_out(tmp_path, "", raw=True)
    (tmp_path / files.TRAIN_LABELS).unlink()
    with pytest.raises(files.DataError, match=f"{files.TRAIN_LABELS} is missing"):
        sources.load(str(tmp_path))


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
    (root / files.LAYOUTS[0] / f"{files.TRAIN_LABELS}.gz").write_bytes(b"broken")
    assert sources.load("auto", root, dead).source == "system"
    assert "Passed over" in capsys.readouterr().err


def test_a_source_asked_for_by_name_never_falls_back(tmp_path):
    for name in ("system", "download", str(tmp_path)):
        with pytest.raises(files.DataError):
            sources.load(name, tmp_path / "root", ["http://127.0.0.1:9/"])


def test_without_a_network_and_without_data_the_sample_is_used(tmp_path, monkeypatch):
    """A process with a loopback that leads nowhere and no system copy still has real data."""
    monkeypatch.undo()
    system = sources.SYSTEM
    hide = f"mount -t tmpfs none {system.parent} && " if system.is_dir() else ""
    isolated = ["unshare", "--net", "--mount", "sh", "-c"]
    try:
        tried = subprocess.run([*isolated, hide + "true"], capture_output=True)
        possible = tried.returncode == 0
    except FileNotFoundError:
        possible = False
    if not possible:
        pytest.skip("needs network and mount namespaces (Linux, root)")
    job = f"{sys.executable} -m bn_lightning fit --trainer.max_epochs 1"
    done = subprocess.run(
        [*isolated, hide + job], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "THIS RUN USES THE PACKAGED SAMPLE" in done.stderr
    found = result_of(tmp_path / "runs" / "lenet" / "0")
    assert found["data_source"] == "sample"
    assert found["test_acc"] > 0.2
    assert weights(tmp_path / "runs/lenet/0/checkpoints/last.ckpt")
