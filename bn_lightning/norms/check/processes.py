"""The property that needs two processes: synchronized, they give the results of one process."""

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

# The number of samples in the shard of each process.
SHARDS = (6, 2)


@norm_property(
    "sync_batchnorm: two unequal shards give the results of one batch",
    tolerance=1e-9,
    advice="Compute count, mean and variance over all processes, and also the sums in the backward "
    "pass.",
)
def two_processes_equal_one(make: Make) -> Answer:
    if not dist.is_available() or not dist.is_gloo_available():
        raise NotApplicable("This build of PyTorch does not include gloo.")
    layer = make(4).double().train()
    try:
        LayerSync().synchronize(copy.deepcopy(layer), "cpu")
    except UserError as error:
        raise NotApplicable(
            "The layer has no attribute sync_batchnorm. "
            "fit --trainer.sync_batchnorm true rejects such a layer."
        ) from error
    one_process = step(layer, batch(4))
    two_processes = _step_on_two_processes(make)
    largest = difference(two_processes, one_process)
    return largest, _cause(two_processes[0], layer) if largest > 1e-9 else ""


def _step_on_two_processes(make: Make) -> list[Tensor]:
    """Return the result of `probes.step`, assembled from the shards of the batch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    arguments = make, port, queue
    spawn(_step_with_shard, arguments, nprocs=len(SHARDS))  # type: ignore[no-untyped-call]
    return [torch.from_numpy(part) for part in queue.get()]


def _step_with_shard(rank: int, make: Make, port: int, queue: Any) -> None:
    """Run the step of one process. Rank 0 puts the assembled results into the queue."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", address, rank=rank, world_size=len(SHARDS))
    layer = LayerSync().synchronize(make(4).double().train(), "cpu")
    gradient = gradient_of(SHAPES[4])
    parts: list[Any] = [None] * len(SHARDS)
    dist.all_gather_object(parts, step(layer, _shards(batch(4))[rank], _shards(gradient)[rank]))
    if rank == 0:
        ys, dxs, *gradients = zip(*parts, strict=True)
        whole = torch.cat(ys), torch.cat(dxs), *(sum(g) for g in gradients)
        queue.put([t.numpy() for t in whole])
    dist.destroy_process_group()


def _shards(x: Tensor) -> tuple[Tensor, ...]:
    return x[: SHARDS[0]], x[SHARDS[0] :]


def _cause(y: Tensor, layer: nn.Module) -> str:
    """Return the mistake that explains the output y, or "" if none does."""
    eps, axes, shards = eps_of(layer), all_but_channels(4), _shards(batch(4))
    means = torch.stack([part.mean(axes) for part in shards])
    variances = torch.stack([part.var(axes, correction=0) for part in shards])
    mean, var = (t.mean(0).view(1, -1, 1, 1) for t in (means, variances))
    if difference(y, (batch(4) - mean) / (var + eps).sqrt()) < 1e-6:
        return (
            "The layer averages the means of the processes with equal weights. "
            "Weight them by the number of samples."
        )
    if difference(y, torch.cat([normalized(part, axes, eps) for part in shards])) < 1e-6:
        return "Each process normalizes its own shard."
    return ""
