"""A GPU of fake tensors, which have a shape, a dtype and a device, but no values.

PyTorch's fake tensors raise if an operation has tensors on different devices, except for
indexing, which is checked here. What blocks the host until the GPU has finished is
recorded: reading a value, and copying a tensor to or from the GPU.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
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
    """

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        devices = {x.device.type for x in tensors}
        if func is READ:
            if devices == {"cuda"}:
                self._record()
            return np.zeros((), str(args[0].dtype).removeprefix("torch.")).item()
        if func in INDEXING and len(devices) > 1:
            raise RuntimeError(f"{func} has tensors on {sorted(devices)}.")
        result = func(*args, **kwargs)
        if func in COPIES and len(devices | {result.device.type}) > 1:
            self._record()
        return result

    def _record(self) -> None:
        frames = [f for f in traceback.extract_stack() if f.filename.startswith(PACKAGE)]
        line = f"{Path(frames[-1].filename).name}: {frames[-1].line}" if frames else "a library"
        self.lines.append(line)


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
