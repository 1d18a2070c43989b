"""Running statistics that several processes estimate together, compared with one process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from bn_lightning import LayerSync, UserError, estimate_statistics
from bn_lightning.norms import registry
from tests.support import processes
from tests.support.pooled_statistics import (
    assert_statistics,
    buffers_of,
    norms_of,
    pooled_statistics,
    randomized,
)

NORMS = ("custom", "builtin", "article", "renorm", "ghost")
SYNCHRONIZED = ("custom", "builtin")
# The batches of each rank: one, several, and none.
BATCHES = {
    2: [((0, 3), (1, 2)), ((), (0, 1, 2, 3))],
    3: [((0,), (1, 2), (3,)), ((0, 1), (), (2, 3))],
}
# The part of each batch that each rank has.
SHARDS = {2: [(0.5, 1), (0.8, 1), (0, 1)], 3: [(0.3, 0.6, 1), (0.2, 0.2, 1)]}


def network_of(norm):
    torch.manual_seed(1)
    make = registry.factory(norm)
    layers = [nn.Conv2d(3, 5, 3), make(5, 4), nn.ReLU(), nn.Dropout(), nn.Flatten(), make(105, 2)]
    return randomized(nn.Sequential(*layers, nn.Linear(105, 2)).double())


def all_batches():
    generator = torch.Generator().manual_seed(2)
    drawn = [torch.randn(n, 3, 9, 5, generator=generator).double() for n in (7, 20, 2, 11)]
    return [x * (1 + i) + i for i, x in enumerate(drawn)]


def synchronized(norm):
    network = network_of(norm)
    LayerSync().synchronize(network, "cpu")
    return network


def results_of_rank(rank, world_size, port, queue):
    """Estimate in all cases on one rank. Rank 0 puts the statistics into the queue."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    batches, found = all_batches(), {}
    for norm in NORMS:
        for parts in BATCHES[world_size]:
            network = network_of(norm)
            own = (batches[i] for i in parts[rank])
            found[norm, parts] = estimated(network, own)
    for norm in SYNCHRONIZED:
        for ends in SHARDS[world_size]:
            network = synchronized(norm)
            own = (shard(x, rank, ends) for x in batches)
            found[norm, ends] = estimated(network, own)
    with pytest.raises(UserError, match="no batches"):
        estimate_statistics(network_of("custom"), [])
    gathered = [None] * world_size
    dist.all_gather_object(gathered, found)
    if rank == 0:
        queue.put(gathered)
    dist.barrier()
    dist.destroy_process_group()


def shard(x, rank, ends):
    first, last = ([0, *ends][i] for i in (rank, rank + 1))
    return x[round(first * len(x)) : round(last * len(x))]


def estimated(network, batches):
    report = estimate_statistics(network, batches)
    assert report.estimated == ["1", "5"]
    assert not report.left
    return [[b.numpy() for b in buffers_of(layer)] for layer in norms_of(network).values()]


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of PyTorch has no gloo")
@pytest.mark.parametrize("world_size", BATCHES)
def test_processes_estimate_the_statistics_of_all_batches(world_size):
    first, *others = processes.result_of_ranks(results_of_rank, world_size)
    num_layouts = len(NORMS) * len(BATCHES[world_size])
    assert len(first) == num_layouts + len(SYNCHRONIZED) * len(SHARDS[world_size])
    for (norm, layout), values in first.items():
        network = network_of(norm)
        for layer, found in zip(norms_of(network).values(), values, strict=True):
            for buffer, value in zip(buffers_of(layer), found, strict=True):
                buffer.copy_(torch.from_numpy(value))
        assert_statistics(network, pooled_statistics(network, all_batches()))
        for other in others:
            for layer, same in zip(values, other[norm, layout], strict=True):
                assert all((a == b).all() for a, b in zip(layer, same, strict=True)), layout
