"""The metrics of an unfinished epoch, in a checkpoint.

Every process keeps its own state: added up in another order, sums would be rounded differently.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat, dim_zero_max, dim_zero_min, dim_zero_sum

from bn_lightning.errors import UserError

# By "METRIC.STATE": a tensor (processes, ...), or for a list state a list of tensors per process.
States = dict[str, Any]


def save(metrics: Mapping[str, Metric], world_size: int) -> States:
    """Return the states of the metrics on all processes. Every process has to call it."""
    return {
        f"{name}.{state}": _from_all_processes(value, world_size)
        for name, metric in metrics.items()
        for state, value in metric.metric_state.items()
    }


def _from_all_processes(value: Tensor | list[Tensor], world_size: int) -> Any:
    if isinstance(value, list):
        own = [part.detach().cpu() for part in value]
        lists: list[Any] = [own]
        if world_size > 1:
            lists = [None] * world_size
            dist.all_gather_object(lists, own)
        return lists
    values = [value]
    if world_size > 1:
        values = [torch.empty_like(value) for _ in range(world_size)]
        dist.all_gather(values, value.contiguous())
    return torch.stack(values).cpu()


def restore(metrics: Mapping[str, Metric], saved: States, rank: int, world_size: int) -> None:
    """Set the states of the metrics on this rank.

    Raises:
        UserError: the run has another number of processes now, and a metric has a state that cannot
            be divided anew.
    """
    for key, by_process in saved.items():
        name, _, state = key.partition(".")
        metric = metrics.get(name)
        if metric is None or state not in metric.metric_state:
            continue  # the task has other metrics now
        if len(by_process) == world_size:
            value = by_process[rank]
        else:
            value = _divided_anew(by_process, metric, name, state, rank)
        if isinstance(value, Tensor):
            setattr(metric, state, value.to(metric.device))
        else:
            setattr(metric, state, [part.to(metric.device) for part in value])


def _divided_anew(by_process: Any, metric: Metric, name: str, state: str, rank: int) -> Any:
    """Return this rank's state, such that all ranks together have what all processes had before."""
    reduction = metric._reductions[state]
    if not isinstance(by_process, Tensor):
        if reduction in (dim_zero_cat, None):
            return [part for parts in by_process for part in parts] if rank == 0 else []
    elif reduction is dim_zero_sum:
        return by_process.sum(0) if rank == 0 else torch.zeros_like(by_process[0])
    elif reduction is dim_zero_max:
        return by_process.amax(0)
    elif reduction is dim_zero_min:
        return by_process.amin(0)
    raise UserError(
        f"The metric {name} cannot be carried over to another number of processes within an epoch: "
        f"its state {state!r} has no sum.\nResume with {len(by_process)} process(es)."
    )
