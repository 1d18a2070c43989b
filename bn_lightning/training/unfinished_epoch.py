"""Saving and restoring the metrics of an unfinished epoch.

The metrics are found in any LightningModule. The state of each rank is saved separately.
Sums in another order would be rounded differently.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import dim_zero_cat, dim_zero_max, dim_zero_min, dim_zero_sum

from bn_lightning.errors import UserError

# Maps "METRIC.STATE" to a tensor (ranks, ...), or to a list of tensors per rank for a
# list state.
States = dict[str, Any]

# torchmetrics counts the updates of a metric in an attribute, which is not a state.
COUNT = "_update_count"


def metrics_of(module: nn.Module) -> dict[str, Metric]:
    """Return the metrics of torchmetrics anywhere in a module, by name."""
    for collection in module.modules():
        if isinstance(collection, MetricCollection):
            # Only the first metric of a group is updated. This lets the others share its
            # state.
            collection.values(copy_state=False)
    return {name: child for name, child in module.named_modules() if isinstance(child, Metric)}


def updated(metrics: Mapping[str, Metric], world_size: int) -> dict[str, Metric]:
    """Return the metrics that any rank has updated. This is a collective operation."""
    if not metrics:
        return {}
    own = torch.tensor([metric.update_count for metric in metrics.values()])
    device = next(iter(metrics.values())).device
    is_updated = _gather(own.to(device), world_size).any(0).tolist()
    return {name: metric for name, metric in metrics.items() if is_updated.pop(0)}


def save(metrics: Mapping[str, Metric], world_size: int) -> States:
    """Return the states of the metrics on all ranks. This is a collective operation."""
    saved: States = {}
    for name, metric in metrics.items():
        count = torch.tensor(metric.update_count, device=metric.device)
        for state, value in {COUNT: count, **metric.metric_state}.items():
            saved[f"{name}.{state}"] = _gather(value, world_size)
    return saved


def _gather(value: Tensor | list[Tensor], world_size: int) -> Any:
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
        UserError: the number of processes has changed, and a state cannot be
            redistributed.
    """
    for key, by_rank in saved.items():
        name, _, state = key.rpartition(".")
        metric = metrics.get(name)
        if metric is None or state not in (*metric.metric_state, COUNT):
            continue  # the module no longer has this metric
        if state == COUNT:
            count = by_rank[rank] if len(by_rank) == world_size else by_rank.max()
            setattr(metric, state, int(count))
            continue
        if len(by_rank) == world_size:
            value = by_rank[rank]
        else:
            value = _redistribute(by_rank, metric, name, state, rank)
        if isinstance(value, Tensor):
            setattr(metric, state, value.to(metric.device))
        else:
            setattr(metric, state, [part.to(metric.device) for part in value])


def _redistribute(by_rank: Any, metric: Metric, name: str, state: str, rank: int) -> Any:
    """Return the state of this rank, so that the reduction over all ranks is the same as before."""
    reduction = metric._reductions[state]
    if not isinstance(by_rank, Tensor):
        if reduction in (dim_zero_cat, None):
            return [part for parts in by_rank for part in parts] if rank == 0 else []
    elif reduction is dim_zero_sum:
        return by_rank.sum(0) if rank == 0 else torch.zeros_like(by_rank[0])
    elif reduction is dim_zero_max:
        return by_rank.amax(0)
    elif reduction is dim_zero_min:
        return by_rank.amin(0)
    raise UserError(
        "The checkpoint is in the middle of an epoch, and was written by "
        f"{len(by_rank)} process(es). The metric {name} cannot be resumed with another number of "
        f"processes: its state {state!r} is not a sum, maximum, minimum or list.\n"
        f"Resume with {len(by_rank)} process(es)."
    )
