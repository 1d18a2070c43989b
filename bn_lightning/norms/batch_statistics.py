"""Mean and variance of a batch, in one process or over the batches of several processes."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bn_lightning.norms.memory_order import MemoryOrder


def batch_statistics(
    x: Tensor, order: MemoryOrder, count: int, group: Any
) -> tuple[Tensor, Tensor, Tensor, int | Tensor]:
    """Return the statistics of a view: mean, variance and unbiased variance, (C,) each, and m.

    `count` is the number of values per channel in this process, and m in the whole group. An
    empty batch has m = 1, which makes its gradients 0 instead of NaN.
    """
    mean = order.mean(x, max(count, 1))
    squares = order.sums((x - order.broadcast(mean)).square_())
    if group is None:
        return mean, squares / max(count, 1), squares / max(count - 1, 1), max(count, 1)
    mean, squares, total = merge(mean, squares, count, group)
    m = total.clamp(min=1)
    return mean, squares / m, squares / (total - 1).clamp(min=1), m


def merge(mean: Tensor, squares: Tensor, count: int, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, sum of squared deviations and number of values per channel, over all processes.

    The arguments are those of this process. The mean and the sum are (C,). The returned
    number is a scalar tensor. Each process adds two parts to the total sum of squared
    deviations: its `squares`, and its count * (its mean - total mean)^2. See Chan, Golub
    and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances", 1979. A process may have any number of values, including 0.
    """
    own = torch.cat([mean, squares, mean.new_full((1,), count)])
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group=group)
    size = len(mean)
    means, all_squares, counts = torch.stack(gathered).tensor_split([size, 2 * size], dim=1)
    total = counts.sum()
    mean = (means * counts).sum(0) / total.clamp(min=1)
    return mean, (all_squares + counts * (means - mean).square()).sum(0), total
