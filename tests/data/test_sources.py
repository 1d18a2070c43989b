"""The sources of the data, and their order."""

import subprocess
import sys
import time

import pytest
import torch

from bn_lightning.data import files, sources
from tests.conftest import ALL_IMAGES, needs_all_images, weights
from tests.support.mirror import write_files
from tests.support.runs import result_of

pytestmark = pytest.mark.usefixtures("small")


@pytest.mark.parametrize("layout", files.LAYOUTS)
@pytest.mark.parametrize("raw", [True, False])
def test_a_folder_is_read_in_each_layout(tmp_path, layout, raw):
    write_files(tmp_path, layout, raw)
    images = sources.load(str(tmp_path))
    assert images.source == "folder"
    assert images.train_images.shape == (6_000, 28, 28)
    assert images.train_images.dtype == torch.uint8


def test_the_sample_is_balanced():
    images = sources.load("sample")
    assert images.train_labels.bincount().tolist() == [600] * 10
    assert images.test_labels.bincount().tolist() == [100] * 10


@needs_all_images
def test_the_sample_has_the_first_images_of_each_class(monkeypatch):
    monkeypatch.undo()
    full, sample = sources.load("system"), sources.load("sample")
    assert full.train_labels.bincount().tolist() == [6_000] * 10
    for split, per_class in (("train", 600), ("test", 100)):
        images, labels = getattr(full, f"{split}_images"), getattr(full, f"{split}_labels")
        by_class = [(labels == c).nonzero().flatten()[:per_class] for c in range(10)]
        first = torch.cat(by_class).sort().values
        assert torch.equal(images[first], getattr(sample, f"{split}_images"))
        assert torch.equal(labels[first], getattr(sample, f"{split}_labels"))


def test_missing_data_are_refused(tmp_path):
    with pytest.raises(files.DataError, match="is not a folder"):
        sources.load(str(tmp_path / "nowhere"))
    with pytest.raises(files.DataError, match="apt-get install dataset-fashion-mnist"):
        sources.load("system")
    write_files(tmp_path, "", raw=True)
    (tmp_path / files.TRAIN_LABELS).unlink()
    with pytest.raises(files.DataError, match=f"{files.TRAIN_LABELS} is missing"):
        sources.load(str(tmp_path))


def test_auto_uses_the_first_source_that_has_the_data(tmp_path, mirror, monkeypatch, capsys):
    root, system, dead = tmp_path / "root", tmp_path / "system", ["http://127.0.0.1:9/"]
    start = time.monotonic()
    assert sources.load("auto", root, dead).source == "sample"
    assert time.monotonic() - start < 15
    assert "THIS RUN USES THE PACKAGED SAMPLE" in capsys.readouterr().err
    assert sources.load("auto", root, [mirror().url]).source == "download"
    write_files(system, "", raw=True)
    monkeypatch.setattr(sources, "SYSTEM", system)
    assert sources.load("auto", tmp_path / "new", dead).source == "system"
    assert sources.load("auto", root, dead).source == "download"
    assert capsys.readouterr().err.count("WARNING") == 0
    (root / files.LAYOUTS[0] / f"{files.TRAIN_LABELS}.gz").write_bytes(b"broken")
    assert sources.load("auto", root, dead).source == "system"
    assert "This source is skipped" in capsys.readouterr().err


def test_a_named_source_has_no_fallback(tmp_path):
    for name in ("system", "download", str(tmp_path)):
        with pytest.raises(files.DataError):
            sources.load(name, tmp_path / "root", ["http://127.0.0.1:9/"])


@pytest.mark.slow
def test_without_network_and_data_the_sample_is_used(tmp_path, monkeypatch):
    """Run in namespaces without a network and without the system's copy."""
    monkeypatch.undo()
    system = sources.SYSTEM
    assert system == ALL_IMAGES
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
