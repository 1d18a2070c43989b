import pytest
import torch

SUFFIXES = ("onnx", "pt2")


@pytest.fixture(autouse=True)
def one_thread():
    """On a busy machine the threads of so small a network wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=SUFFIXES)
def suffix(request):
    if request.param == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    return request.param
