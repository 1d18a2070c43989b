"""The norms across processes, each with its own share of a batch, against one process with the whole batch."""

import socket

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import nn

from bn_lightning import BatchNorm, LeNet, UserError
from bn_lightning.norms.sync import LayerSync
from tests.conftest import QUICK, command, weights

# How the images of a batch lie on the processes: even, uneven, one value on a rank, an empty rank.
SHARES = {2: [(4, 4), (7, 3), (7, 1), (8, 0)], 3: [(3, 3, 3), (6, 3, 1), (1, 8, 0)]}
SHAPES = {2: (5,), 3: (5, 7), 4: (5, 6, 4), 5: (5, 3, 2, 2)}
CASES = [
    (num_dims, layout, dtype)
    for num_dims in SHAPES
    for layout in (("contiguous",) if num_dims == 2 else ("contiguous", "channels last"))
    for dtype in (torch.float64, torch.float32)
]


def batch_of(num_images, num_dims, layout, dtype):
    generator = torch.Generator().manual_seed(num_images)
    x, gradient = (
        3 * torch.randn(2, num_images, *SHAPES[num_dims], generator=generator, dtype=torch.float64)
        + 1
    ).to(dtype)
    return (
        x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "channels last" else x
    ), gradient


def two_steps(layer, x, gradient):
    for _ in range(2):
        layer.zero_grad()
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = layer(leaf)
        y.backward(gradient)
    return y.detach(), leaf.grad


def results_of_a_process(rank, world_size, port, queue):
    """Per shares and case: whole output and gradient by input, summed gradients by the parameters, statistics."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    results = {}
    for shares in SHARES[world_size]:
        for case in CASES:
            x, gradient = batch_of(sum(shares), *case)
            layer = BatchNorm(5, dtype=case[2])
            layer.sync_batchnorm = True
            mine = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
            y, dx = two_steps(layer, x[mine], gradient[mine])
            parts = [None] * world_size
            dist.all_gather_object(
                parts, (y, dx, layer.weight.grad, layer.bias.grad, *layer.buffers())
            )
            ys, dxs, weights, biases, *buffers = zip(*parts, strict=True)
            assert all(torch.equal(buffer, its[0]) for its in buffers for buffer in its), (
                "ranks differ"
            )
            whole = (
                torch.cat(ys),
                torch.cat(dxs),
                sum(weights),
                sum(biases),
                *(its[0] for its in buffers),
            )
            results[shares, case] = [tensor.numpy() for tensor in whole]
    if rank == 0:
        queue.put(results)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("world_size", SHARES)
def test_processes_are_one(world_size):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    processes = torch.multiprocessing.spawn(
        results_of_a_process, (world_size, port, queue), nprocs=world_size, join=False
    )
    results = queue.get()
    processes.join()
    assert len(results) == len(SHARES[world_size]) * len(CASES)
    for (shares, case), values in results.items():
        alone = BatchNorm(5, dtype=case[2])
        y, dx = two_steps(alone, *batch_of(sum(shares), *case))
        expected = [y, dx, alone.weight.grad, alone.bias.grad, *alone.buffers()]
        # outputs within 2e-6 and gradients within 1e-5 in float32
        tolerances = (
            [1e-12] * 7 if case[2] == torch.float64 else [2e-6, 1e-5, 1e-5, 1e-5, 1e-5, 1e-5, 0]
        )
        for value, truth, tolerance in zip(values, expected, tolerances, strict=True):
            truth, value = truth.detach(), torch.from_numpy(value)
            assert (value - truth).abs().max() <= tolerance * max(1, truth.abs().max().item()), (
                shares,
                case,
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "alone"), [("custom", "custom"), ("builtin", "custom"), ("builtin", "builtin")]
)
def test_fit_on_two_processes_is_fit_on_one(norm, alone, tmp_path):
    settings = (*QUICK[:2], "--trainer.precision", "64-true", "--trainer.max_steps", 50)
    command("fit", *settings, "--model.norm", alone, "--name", "one", cwd=tmp_path)
    processes = (
        "--trainer.devices",
        2,
        "--trainer.strategy",
        "ddp",
        "--trainer.sync_batchnorm",
        "true",
    )
    command("fit", *settings, *processes, "--model.norm", norm, "--name", "two", cwd=tmp_path)
    files = [tmp_path / f"runs/{name}/0/checkpoints/last.ckpt" for name in ("one", "two")]
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


@pytest.mark.parametrize("norm", ["custom", "builtin"])
def test_plugin_changes_nothing_but_the_class_and_takes_it_back(norm):
    model, plugin = Module(norm), LayerSync()
    before = [type(module) for module in model.modules()]
    tensors = {name: id(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    plugin.apply(model)
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    assert len(norms) == 4
    assert all(module.sync_batchnorm for module in norms)
    assert model.network(torch.rand(3, 1, 28, 28)).shape == (3, 10)  # no process group: as without
    plugin.revert(model)
    assert [type(module) for module in model.modules()] == before
    assert {
        name: id(t) for name, t in (*model.named_parameters(), *model.named_buffers())
    } == tensors
    assert not any(
        getattr(module, "sync_batchnorm", False)
        for module in model.modules()
        if isinstance(module, BatchNorm)
    )


def test_plugin_refuses_what_cannot_be_synchronized():
    with pytest.raises(UserError, match=r"network\.norm1, a BatchNorm, cannot"):
        LayerSync().apply(Module("article"))
    LayerSync().apply(Module("none"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_plugin_gives_torchs_layers_torchs_class_on_cuda():
    model = Module("builtin")
    model.trainer = pl.Trainer(accelerator="cuda", devices=1, logger=False)
    LayerSync().apply(model)
    assert sum(type(module) is nn.SyncBatchNorm for module in model.modules()) == 4
