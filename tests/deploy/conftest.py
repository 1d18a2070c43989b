import pytest
import torch

from bn_lightning.deploy import export

SUFFIXES = ("onnx", "pt2")


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread: on a busy machine, threads of such a small network mostly wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def one_timing_round(monkeypatch):
    """Print timings of a single round, to save a second per export."""
    monkeypatch.setattr(export, "TIMING_SECONDS", 0)


@pytest.fixture(params=SUFFIXES)
def suffix(request):
    if request.param == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    return request.param
