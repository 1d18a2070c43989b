"""The property that needs two processes: synchronized, they give the results of one process."""

import pickle
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from bn_lightning.norms.check import inputs
from bn_lightning.norms.check.findings import Comparison, NotApplicable, norm_property
from bn_lightning.norms.check.subject import Case, Norm
from bn_lightning.norms.convert import TORCH
from bn_lightning.norms.sync import LayerSync

# The numbers of samples in the shards of the two processes, in three steps.
SHARDS = ((6, 3), (9, 0), (2, 7))


@norm_property(
    "deployment",
    "Synchronized, two processes with unequal shards give the results of one.",
    advice="Compute count, mean and variance over all processes, also for the running statistics, "
    "and the sums of the backward pass too.",
)
def synchronization(norm: Norm) -> Iterator[Comparison]:
    if not dist.is_available() or not dist.is_gloo_available():
        raise NotApplicable("This build of PyTorch does not include gloo.")
    kind = norm.kinds.get(4) or list(norm.kinds.values())[-1]
    case = norm.one_case(kind, 9, training=True)
    if not _can_be_synchronized(case.layer()):
        raise NotApplicable(
            "The layer has no attribute sync_batchnorm. If it has running statistics, "
            "fit --trainer.sync_batchnorm true rejects it."
        )
    try:
        pickle.dumps(norm.build)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise NotApplicable(
            "The norm cannot be sent to another process. Define it at the top level of a module."
        ) from error
    expected = _on_one_process(case)
    found = _on_two_processes(case)
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        difference = inputs.difference(ours, theirs)
        cause = "" if difference <= 1e-6 else _cause(ours, case, step)
        yield Comparison(difference, max(case.tolerance, 1e-9), cause)


def _can_be_synchronized(layer: nn.Module) -> bool:
    return any(
        hasattr(module, "sync_batchnorm") or type(module) in TORCH.values()
        for module in layer.modules()
    )


def _batches(case: Case) -> list[tuple[Tensor, Tensor]]:
    """Return inputs and gradients of the outputs, one pair for each step."""
    return [
        (inputs.batch(case.shape, seed).to(case.dtype), inputs.random(case.shape, seed + 20))
        for seed in range(len(SHARDS))
    ]


def _on_one_process(case: Case) -> list[dict[str, Tensor]]:
    """Return the results of each step, and the output in evaluation after it."""
    layer, results = case.layer(), []
    for x, g in _batches(case):
        step = inputs.step(layer, x, g)
        results.append(step | {"evaluation": inputs.evaluate(layer, case.x)})
    return results


def _on_two_processes(case: Case) -> list[dict[str, Tensor]]:
    """Return the results, assembled from the shards of each batch.

    Raises:
        Exception: one of the processes has failed, or has not answered for a minute.
    """
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        path = Path(folder, "results.pt")
        # A formula cannot be pickled.
        sent = replace(case, kind=replace(case.kind, fit=None))
        spawn(_run_shards, (sent, port, path), nprocs=2)  # type: ignore[no-untyped-call]
        results: list[dict[str, Tensor]] = torch.load(path)
    return results


def _run_shards(rank: int, case: Case, port: int, path: Path) -> None:
    """Run the steps of one process. Rank 0 writes the assembled results."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    layer = LayerSync().synchronize(case.layer(), "cpu")
    results = []
    for (x, g), sizes in zip(_batches(case), SHARDS, strict=True):
        shard = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], None)
        parts: list[Any] = [None, None]
        dist.all_gather_object(parts, inputs.step(layer, x[shard], g[shard]))
        whole = {name: _assembled(name, parts) for name in parts[0]}
        results.append(whole | {"evaluation": inputs.evaluate(layer, case.x)})
    if rank == 0:
        torch.save(results, path)
    dist.destroy_process_group()


def _assembled(name: str, parts: list[dict[str, Tensor]]) -> Tensor:
    tensors = [part[name] for part in parts]
    return torch.cat(tensors) if name in ("output", "input") else torch.stack(tensors).sum(0)


def _cause(found: dict[str, Tensor], case: Case, step: int) -> str:
    """Return the mistake that explains the results of a step, or ""."""
    fit, x = case.kind.fit, _batches(case)[step][0].double()
    if fit is None:
        return ""
    axes = [d for d in range(x.dim()) if d != 1]
    shards = [part for part in torch.split(x, list(SHARDS[step])) if len(part)]
    shape = (1, -1, *[1] * (x.dim() - 2))
    y = (found["output"].double() - fit.shift.view(shape)) / fit.scale.view(shape)
    means = torch.stack([part.mean(axes, keepdim=True) for part in shards])
    variances = torch.stack([part.var(axes, correction=0, keepdim=True) for part in shards])
    own = [
        (part - m) / (v + fit.eps).sqrt()
        for part, m, v in zip(shards, means, variances, strict=True)
    ]
    if inputs.difference(y, torch.cat(own)) < 1e-4:
        return "Each process normalizes its own shard."
    averaged = (x - means.mean(0)) / (variances.mean(0) + fit.eps).sqrt()
    if inputs.difference(y, averaged) < 1e-4:
        return (
            "The layer averages the statistics of the processes with equal weights. Weight them "
            "by the number of samples, and add the variance of the means."
        )
    exact = (x - x.mean(axes, keepdim=True)) / (
        x.var(axes, correction=0, keepdim=True) + fit.eps
    ).sqrt()
    if inputs.difference(y, exact) < 1e-4:
        return "The output is right, but gradients or running statistics are those of one shard."
    return ""
