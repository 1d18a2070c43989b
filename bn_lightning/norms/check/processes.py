"""The property that needs two processes: synchronized, they give the results of one process."""

import pickle
import socket
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from math import inf
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from bn_lightning.errors import UserError
from bn_lightning.norms.check import inputs
from bn_lightning.norms.check.findings import Comparison, NotApplicable, describe, norm_property
from bn_lightning.norms.check.subject import Case, Norm
from bn_lightning.norms.convert import TORCH
from bn_lightning.norms.definition import per_channel
from bn_lightning.norms.sync import LayerSync

# The numbers of samples in the shards of the two processes. Before the first step, the layer is
# not told to synchronize.
SHARDS = ((7, 5), (8, 4), (2, 8), (14, 0))
# How long a process waits for the other one.
SECONDS = 20


@norm_property(
    "deployment",
    "Synchronized, two processes with unequal shards give the results of one.",
    advice="Compute count, mean and variance over all processes, also for the running statistics, "
    "and the sums of the backward pass too.",
)
def synchronization(norm: Norm) -> Iterator[Comparison]:
    if not dist.is_available() or not dist.is_gloo_available():
        raise NotApplicable("This build of PyTorch does not include gloo.")
    kind = norm.one_kind
    case = norm.one_case(kind, 12, training=True)
    is_told = _synchronized(case) is not None
    if not is_told and (kind.is_per_sample or kind.state_is_fixed):
        raise NotApplicable("The layer normalizes each sample by itself, or has fixed statistics.")
    try:
        pickle.dumps(norm.build)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise NotApplicable(
            "The norm cannot be sent to another process. Define it at the top level of a module."
        ) from error
    expected = _on_one_process(case)
    results, errors = _on_two_processes(case)
    if not results:
        cause = "The two processes end with an error.\n" + "\n".join(dict.fromkeys(errors))
        yield Comparison(inf, 0, cause)
        return
    alone, *found = results
    is_synchronized = not inputs.difference(alone, _own_shards(case)) <= 1e-6
    if is_told:
        cause = "The layer synchronizes processes although sync_batchnorm is False."
        yield Comparison(float(is_synchronized), 0, cause)
    elif not is_synchronized:
        raise NotApplicable(
            "Each process normalizes its own shard: the layer has no attribute sync_batchnorm. "
            "If it has running statistics, fit --trainer.sync_batchnorm true rejects it."
        )
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=False), start=1):
        difference = inputs.difference(ours, theirs)
        cause = "" if difference <= 1e-6 else _cause(ours, case, step)
        yield Comparison(difference, max(case.tolerance, 1e-9), cause)
    if len(found) < len(expected):
        shards = " and ".join(map(str, SHARDS[1 + len(found)]))
        cause = f"With shards of {shards} samples, the processes end with an error.\n"
        yield Comparison(inf, 0, cause + "\n".join(dict.fromkeys(errors)))


def _synchronized(case: Case) -> nn.Module | None:
    """Return a layer that is told to synchronize its statistics, or None if it cannot be told."""
    layer = case.layer()
    if not any(
        hasattr(module, "sync_batchnorm") or type(module) in TORCH.values()
        for module in layer.modules()
    ):
        return None
    try:
        return LayerSync().synchronize(layer, "cpu")
    except UserError:
        return None


def _own_shards(case: Case) -> Tensor:
    """Return the output of the first step if each process normalizes its own shard."""
    x, _ = _batches(case)[0]
    return torch.cat([case.layer()(part) for part in torch.split(x, list(SHARDS[0]))])


def _batches(case: Case) -> list[tuple[Tensor, Tensor]]:
    """Return inputs and gradients of the outputs, one pair for each step."""
    shapes = [(sum(sizes), *case.shape[1:]) for sizes in SHARDS]
    return [
        (inputs.batch(shape, seed).to(case.dtype), inputs.random(shape, seed + 20))
        for seed, shape in enumerate(shapes)
    ]


def _on_one_process(case: Case) -> list[dict[str, Tensor]]:
    """Return the results of each step but the first, and the output in evaluation after it."""
    layer, results = case.layer(), []
    for x, g in _batches(case)[1:]:
        step = inputs.step(layer, x, g)
        results.append(step | {"evaluation": inputs.evaluate(layer, case.x)})
    return results


def _on_two_processes(case: Case) -> tuple[list[Any], list[str]]:
    """Return the results of each step, assembled from the shards, and the errors of processes.

    The first result is an output only. After an error, there are no more steps.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # A formula cannot be pickled.
        sent = replace(case, kind=replace(case.kind, fit=None))
        spawn(_run_shards, (sent, port, folder, SECONDS), nprocs=2)  # type: ignore[no-untyped-call]
        results = [torch.load(path) for path in sorted(folder.glob("*.pt"))]
        errors = [path.read_text() for path in sorted(folder.glob("*.txt"))]
    return results, errors


def _run_shards(rank: int, case: Case, port: int, folder: Path, seconds: int) -> None:
    """Run the steps of one process. Write the results of rank 0, and the errors."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # Their past batches are not split over processes.
    layer = case.layer()
    told = _synchronized(case) or layer
    dist.init_process_group(
        "gloo",
        f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=seconds),
    )
    try:
        for number, ((x, g), sizes) in enumerate(zip(_batches(case), SHARDS, strict=True)):
            shard = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], None)
            parts: list[Any] = [None, None]
            if number == 0:
                dist.all_gather_object(parts, layer(x[shard]).detach())
                results: Any = torch.cat(parts)
                layer = told
            else:
                dist.all_gather_object(parts, inputs.step(layer, x[shard], g[shard]))
                results = {name: _assembled(name, parts) for name in parts[0]}
                results["evaluation"] = inputs.evaluate(layer, case.x)
            if rank == 0:
                torch.save(results, folder / f"{number}.pt")
    except Exception as error:
        # The other process then fails too, because the connection is closed.
        (folder / f"{rank}.txt").write_text(describe(error))
        return
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
    y = (found["output"].double() - per_channel(fit.shift, x)) / per_channel(fit.scale, x)
    means = torch.stack([part.mean(axes, keepdim=True) for part in shards])
    variances = torch.stack([part.var(axes, correction=0, keepdim=True) for part in shards])
    own = [
        (part - m) / (v + fit.eps).sqrt()
        for part, m, v in zip(shards, means, variances, strict=True)
    ]
    if inputs.difference(y, torch.cat(own)) < 1e-4:
        return "Each process normalizes its own shard."
    mean = means.mean(0)
    squares = torch.stack([(s - mean).square().mean(axes, keepdim=True) for s in shards])
    averaged = [(x - mean) / (var.mean(0) + fit.eps).sqrt() for var in (variances, squares)]
    if min(inputs.difference(y, a) for a in averaged) < 1e-4:
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
