"""A GPU of fake tensors, which have a shape, a dtype and a device, but no values.

PyTorch's fake tensors raise if an operation has tensors on different devices, except for
indexing, which is checked here. What blocks the host until the GPU has finished is
recorded: reading a value, and copying a tensor to or from the GPU.
"""

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torchgen
import yaml
from lightning.pytorch.plugins import CheckpointIO, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import bn_lightning

CUDA = torch.device("cuda", 0)
PACKAGE = str(Path(bn_lightning.__file__).parent)
READ = torch.ops.aten._local_scalar_dense.default
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)


class Synchronizations(TorchDispatchMode):
    """Records the lines of the package that block the host. All values that are read are 0.

    Attributes:
        lines: the recorded lines, such as "task.py: loss.item()".
        float64: lines with a float64 tensor on the GPU.
        operations: names of all operations, such as "aten::add.Tensor".
    """

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.float64: set[str] = set()
        self.operations: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.operations.add(func.name())
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        devices = {x.device.type for x in tensors}
        if func is READ:
            if devices == {"cuda"}:
                self.lines.append(_line())
            return np.zeros((), str(args[0].dtype).removeprefix("torch.")).item()
        if func in INDEXING and len(devices) > 1:
            raise RuntimeError(f"{func} has tensors on {sorted(devices)}.")
        result = func(*args, **kwargs)
        if func in COPIES and len(devices | {result.device.type}) > 1:
            self.lines.append(_line())
        if any(x.dtype == torch.float64 and x.device == CUDA for x in tensors):
            self.float64.add(_line())
        return result


def _line() -> str:
    frames = [f for f in traceback.extract_stack() if f.filename.startswith(PACKAGE)]
    return f"{Path(frames[-1].filename).name}: {frames[-1].line}" if frames else "a library"


def missing_on_mps(operations: set[str]) -> set[str]:
    """Return the operations that have no implementation for Apple's GPUs, by PyTorch's own list."""
    listed = next(Path(torchgen.__file__).parent.rglob("native_functions.yaml"))
    entries = yaml.load(listed.read_text(), yaml.CSafeLoader)
    functions = {entry["func"].partition("(")[0]: entry for entry in entries}

    def is_missing(name: str) -> bool:
        entry = functions.get(name.removeprefix("aten::"), {})
        entry = functions[entry["structured_delegate"]] if "structured_delegate" in entry else entry
        backends = ",".join(entry.get("dispatch", {}))
        # An operation without backends consists of other operations.
        return bool(backends) and not re.search("MPS|Composite", backends)

    return {name for name in operations if is_missing(name)}


@contextmanager
def fake_cuda() -> Iterator[Synchronizations]:
    """Make all new tensors fake, and record synchronizations."""
    with pytest.MonkeyPatch.context() as patch:
        # A backward pass needs a GPU, and fake tensors do not support the other two.
        patch.setattr(torch.autograd, "grad", lambda y, x: [torch.zeros_like(x)])
        patch.setattr(FakeTensor, "__deepcopy__", lambda x, memo: x.detach().clone(), raising=False)
        patch.setattr(FakeTensor, "numpy", lambda x: np.zeros(x.shape), raising=False)
        with FakeTensorMode(allow_non_fake_inputs=False), Synchronizations() as synchronizations:
            yield synchronizations


class FakeGPU(SingleDeviceStrategy):
    """Trains on the fake GPU. The network must have been created there."""

    def __init__(self) -> None:
        super().__init__(CUDA, precision_plugin=NoBackward(), checkpoint_io=InMemory())

    def setup_environment(self) -> None:
        pass

    def model_to_device(self) -> None:
        pass

    def teardown(self) -> None:
        pass


class NoBackward(Precision):
    """Sets all gradients to 0, because a backward pass needs a GPU."""

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kw: Any) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)


class InMemory(CheckpointIO):
    """Keeps the checkpoints of all trainers in memory, because fake tensors cannot be written."""

    checkpoints: ClassVar[dict[str, Any]] = {}

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        on_cpu = tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, checkpoint)
        self.checkpoints[str(path)] = on_cpu

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        return self.checkpoints[str(path)]

    def remove_checkpoint(self, path: Any) -> None:
        del self.checkpoints[str(path)]
