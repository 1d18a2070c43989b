"""The property of a norm that takes several processes: synchronized, they equal one."""

import copy
import socket
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from bn_lightning.errors import UserError
from bn_lightning.norms.check.findings import Answer, Make, NotApplicable, norm_property
from bn_lightning.norms.check.probes import (
    SHAPES,
    all_but_channels,
    batch,
    difference,
    eps_of,
    gradient_of,
    normalized,
    step,
)
from bn_lightning.norms.sync import LayerSync

SHARES = (6, 2)  # The number of samples on each of two processes.


@norm_property(
    "two processes with unequal shares are as one (sync_batchnorm)",
    tolerance=1e-9,
    advice="take count, mean and deviation over all processes, and the sums of the backward pass",
)
def two_processes_equal_one(make: Make) -> Answer:
    if not dist.is_available() or not dist.is_gloo_available():
        raise NotApplicable("this torch has no gloo")
    layer = make(4).double().train()
    try:
        LayerSync().synchronize(copy.deepcopy(layer), "cpu")
    except UserError as error:
        raise NotApplicable(
            "it has no attribute sync_batchnorm, and the flag is refused with it"
        ) from error
    whole = step(layer, batch(4))
    y, dx, *by_parameters = _step_on_two_processes(make)
    found = difference([y, dx, *by_parameters], whole)
    return found, _cause(y, layer) if found > 1e-9 else ""


def _step_on_two_processes(make: Make) -> list[Tensor]:
    """Return what `probes.step` returns, put together from the shares of the batch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    arguments = make, port, queue
    spawn(_step_with_share, arguments, nprocs=len(SHARES))  # type: ignore[no-untyped-call]
    return [torch.from_numpy(part) for part in queue.get()]


def _step_with_share(rank: int, make: Make, port: int, queue: Any) -> None:
    """Take the step of one process. Rank 0 puts the results of all processes into the queue."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", address, rank=rank, world_size=len(SHARES))
    layer = LayerSync().synchronize(make(4).double().train(), "cpu")
    gradient = gradient_of(SHAPES[4])
    parts: list[Any] = [None] * len(SHARES)
    dist.all_gather_object(parts, step(layer, _shares(batch(4))[rank], _shares(gradient)[rank]))
    if rank == 0:
        ys, dxs, *gradients = zip(*parts, strict=True)
        whole = torch.cat(ys), torch.cat(dxs), *(sum(g) for g in gradients)
        queue.put([t.numpy() for t in whole])
    dist.destroy_process_group()


def _shares(x: Tensor) -> tuple[Tensor, ...]:
    return x[: SHARES[0]], x[SHARES[0] :]


def _cause(y: Tensor, layer: nn.Module) -> str:
    """Compare the output with two wrong ways to normalize."""
    eps, axes, shares = eps_of(layer), all_but_channels(4), _shares(batch(4))
    means = torch.stack([part.mean(axes) for part in shares])
    variances = torch.stack([part.var(axes, correction=0) for part in shares])
    mean, var = (t.mean(0).view(1, -1, 1, 1) for t in (means, variances))
    if difference(y, (batch(4) - mean) / (var + eps).sqrt()) < 1e-6:
        return (
            "it takes the mean of the processes' means, where each counts alike whatever its share"
        )
    if difference(y, torch.cat([normalized(part, axes, eps) for part in shares])) < 1e-6:
        return "each process normalizes its own share"
    return ""
