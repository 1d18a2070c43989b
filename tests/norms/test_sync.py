"""Norms synchronized across processes, compared with one process that has the whole batch."""

import functools

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import nn

from bn_lightning import BatchNorm, LeNet, UserError
from bn_lightning.norms.sync import LayerSync
from tests.conftest import QUICK, command, run_here, weights
from tests.support import processes

# The number of samples on each rank: even, uneven, one sample, and none.
SHARDS = {2: [(4, 4), (7, 3), (7, 1), (8, 0)], 3: [(3, 3, 3), (6, 3, 1), (1, 8, 0)]}
SHAPES = {2: (5,), 3: (5, 7), 4: (5, 6, 4), 5: (5, 3, 2, 2)}
CASES = [
    (num_dims, layout, dtype)
    for num_dims in SHAPES
    for layout in (("contiguous",) if num_dims == 2 else ("contiguous", "channels last"))
    for dtype in (torch.float64, torch.float32)
]


def batch_of(num_samples, num_dims, layout, dtype):
    """Return an input and the gradient of the output."""
    generator = torch.Generator().manual_seed(num_samples)
    shape = (2, num_samples, *SHAPES[num_dims])
    values = 3 * torch.randn(shape, generator=generator, dtype=torch.float64) + 1
    x, gradient = values.to(dtype)
    if layout == "channels last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x, gradient


def two_steps(layer, x, gradient):
    for _ in range(2):
        layer.zero_grad()
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        # Operations in place must work behind the layer.
        y = layer(leaf).mul_(2)
        y.backward(gradient)
    return y.detach(), leaf.grad


def results_of_rank(rank, world_size, port, queue):
    """Run all cases on one rank. Rank 0 puts the merged results into the queue."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    results = {}
    for shards in SHARDS[world_size]:
        for case in CASES:
            x, gradient = batch_of(sum(shards), *case)
            layer = BatchNorm(5, dtype=case[2])
            layer.sync_batchnorm = True
            shard = slice(sum(shards[:rank]), sum(shards[: rank + 1]))
            y, dx = two_steps(layer, x[shard], gradient[shard])
            own = (y, dx, layer.weight.grad, layer.bias.grad, *layer.buffers())
            parts = [None] * world_size
            dist.all_gather_object(parts, own)
            results[shards, case] = [tensor.numpy() for tensor in merge(parts)]
    if rank == 0:
        queue.put(results)
    dist.barrier()
    dist.destroy_process_group()


def merge(parts):
    """Merge the results of all ranks: concatenate shards, and sum the gradients of parameters."""
    ys, dxs, weights, biases, *buffers = zip(*parts, strict=True)
    for values in buffers:
        assert all(torch.equal(value, values[0]) for value in values), "the buffers differ"
    first_rank = [values[0] for values in buffers]
    return [torch.cat(ys), torch.cat(dxs), sum(weights), sum(biases), *first_rank]


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of PyTorch has no gloo")
@pytest.mark.parametrize("world_size", SHARDS)
def test_synchronized_processes_give_the_results_of_one_process(world_size):
    results = processes.result_of_ranks(results_of_rank, world_size)
    assert len(results) == len(SHARDS[world_size]) * len(CASES)
    for (shards, case), values in results.items():
        alone = BatchNorm(5, dtype=case[2])
        y, dx = two_steps(alone, *batch_of(sum(shards), *case))
        expected = [y, dx, alone.weight.grad, alone.bias.grad, *alone.buffers()]
        # In order: output, three gradients, running mean and variance, number of batches.
        tolerances = [1e-12] * 7 if case[2] == torch.float64 else [2e-6, *[1e-5] * 5, 0]
        for value, truth, tolerance in zip(values, expected, tolerances, strict=True):
            truth, value = truth.detach(), torch.from_numpy(value)
            largest_error = (value - truth).abs().max()
            scale = max(1, truth.abs().max().item())
            assert largest_error <= tolerance * scale, (shards, case)


@pytest.fixture(scope="module")
def fit(tmp_path_factory):
    """Return a function that trains for 50 steps, once for each combination of arguments."""

    @functools.cache
    def fit(norm, devices):
        cwd = tmp_path_factory.mktemp(f"{norm}-{devices}")
        settings = [*QUICK[:2], "--trainer.precision", "64-true", "--trainer.max_steps", 50]
        if devices > 1:
            settings += ["--trainer.devices", devices, "--trainer.strategy", "ddp"]
            settings += ["--trainer.sync_batchnorm", "true"]
        run = run_here if devices == 1 else command
        run("fit", *settings, "--model.norm", norm, cwd=cwd)
        return cwd / "runs/lenet/0/checkpoints/last.ckpt"

    return fit


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "alone"), [("custom", "custom"), ("builtin", "custom"), ("builtin", "builtin")]
)
def test_fit_with_two_processes_gives_the_weights_of_fit_with_one(norm, alone, fit):
    files = [fit(alone, 1), fit(norm, 2)]
    assert [torch.load(file, weights_only=True)["global_step"] for file in files] == [50, 50]
    one, two = map(weights, files)
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-9, msg=name)


class Module(pl.LightningModule):
    def __init__(self, norm):
        super().__init__()
        self.network = LeNet(norm)
        self.trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False)


def tensor_ids(model):
    return {name: id(t) for name, t in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("norm", ["custom", "builtin"])
def test_plugin_changes_only_the_class_and_restores_it(norm):
    model, plugin = Module(norm), LayerSync()
    before = [type(module) for module in model.modules()]
    tensors = tensor_ids(model)
    plugin.apply(model)
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    assert len(norms) == 4
    assert all(module.sync_batchnorm for module in norms)
    # Without a process group, the layers normalize the batch of this process.
    assert model.network(torch.rand(3, 1, 28, 28)).shape == (3, 10)
    plugin.revert(model)
    assert [type(module) for module in model.modules()] == before
    assert tensor_ids(model) == tensors
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    assert not any(module.sync_batchnorm for module in norms)


def test_plugin_rejects_a_layer_that_cannot_be_synchronized():
    with pytest.raises(UserError, match=r"network\.norm1, a BatchNorm, does not support"):
        LayerSync().apply(Module("article"))
    LayerSync().apply(Module("none"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_plugin_converts_pytorchs_layers_to_sync_batch_norm_on_cuda():
    model = Module("builtin")
    model.trainer = pl.Trainer(accelerator="cuda", devices=1, logger=False)
    LayerSync().apply(model)
    assert sum(type(module) is nn.SyncBatchNorm for module in model.modules()) == 4
