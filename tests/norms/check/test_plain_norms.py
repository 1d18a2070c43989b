"""The bases of the mutants agree with PyTorch's layers, or with other formulas."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from tests.support import processes
from tests.support.norm_batches import scattered
from tests.support.plain_norms import BASES, BatchNorm, ManualBatchNorm

SHAPES = {2: (11, 6), 3: (11, 6, 5), 4: (11, 6, 4, 3), 5: (5, 6, 3, 2, 2)}
DTYPES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}
TORCH_BATCH_NORM = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
TORCH_INSTANCE_NORM = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}


class Reference(nn.Module):
    """A layer with weight and bias of shape (C,) whose output is another formula."""

    def __init__(self, compute, **buffers):
        super().__init__()
        self.compute = compute
        self.weight = nn.Parameter(torch.ones(6))
        self.bias = nn.Parameter(torch.zeros(6))
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x):
        return self.compute(self, x)


class GhostReference(nn.Module):
    """PyTorch's batch norm, applied to each virtual batch."""

    def __init__(self, num_dims):
        super().__init__()
        self.inner = TORCH_BATCH_NORM[num_dims](6)
        self.weight, self.bias = self.inner.weight, self.inner.bias

    running_mean = property(lambda self: self.inner.running_mean)
    running_var = property(lambda self: self.inner.running_var)

    def forward(self, x):
        parts = x.split(8) if self.training else [x]
        return torch.cat([self.inner(part) for part in parts])


def renorm(layer, x):
    """Compute y = gamma * (x_hat * r + d) + beta with PyTorch's batch norm as x_hat."""
    mean, std = layer.running_mean, layer.running_std
    if not layer.training:
        # PyTorch 2.11 accepts no eps of 0.
        return F.batch_norm(x, mean, std**2, layer.weight, layer.bias, eps=1e-30)
    rows = x.movedim(1, 0).flatten(1).detach()
    batch_mean, batch_std = rows.mean(1), (rows.var(1, correction=0) + 1e-5).sqrt()
    r, d = (batch_std / std).clip(1 / 3, 3), ((batch_mean - mean) / std).clip(-5, 5)
    layer.running_mean = 0.9 * mean + 0.1 * batch_mean
    layer.running_std = 0.9 * std + 0.1 * batch_std
    return F.batch_norm(
        x, None, None, layer.weight * r, layer.weight * d + layer.bias, training=True
    )


REFERENCES = {
    "batch_norm": lambda dims: TORCH_BATCH_NORM[dims](6),
    "manual_batch_norm": lambda dims: TORCH_BATCH_NORM[dims](6),
    "layer_norm": lambda dims: Reference(lambda n, x: F.group_norm(x, 1, n.weight, n.bias)),
    "group_norm": lambda dims: nn.GroupNorm(2, 6),
    "instance_norm": lambda dims: TORCH_INSTANCE_NORM[dims](
        6, affine=True, track_running_stats=True
    ),
    "rms_norm": lambda dims: Reference(
        lambda n, x: (
            F.rms_norm(x.movedim(1, -1).to(n.weight), (6,), n.weight, 1e-5).movedim(-1, 1).to(x)
        )
    ),
    "ghost_batch_norm": GhostReference,
    "batch_renorm": lambda dims: Reference(
        renorm, running_mean=torch.zeros(6), running_std=torch.ones(6)
    ),
}


def pair(name, num_dims, dtype):
    """Return a base and its reference with the same random gamma and beta."""
    layer, reference = BASES[name](num_features=6, num_dims=num_dims), REFERENCES[name](num_dims)
    for attribute in ("weight", "bias"):
        if hasattr(layer, attribute):
            values = torch.randn(6, generator=torch.Generator().manual_seed(len(attribute)))
            for module in (layer, reference):
                parameter = getattr(module, attribute)
                parameter.data.copy_(values.view(parameter.shape))
    # PyTorch's layers keep their float32 parameters for 16-bit input.
    wide = torch.promote_types(dtype, torch.float32)
    return layer.to(wide), reference.to(wide)


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_same(layer, reference, x, tolerance):
    """Compare the output and all gradients of the two layers."""
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(9)).to(x)
    results = []
    for module in (layer, reference):
        own = x.clone().requires_grad_()
        y = module(own)
        parameters = [p for n, p in module.named_parameters() if hasattr(layer, n.split(".")[-1])]
        gradients = torch.autograd.grad((y * weights).sum(), [own, *parameters])
        results.append([y, gradients[0], *[g.flatten() for g in gradients[1:]]])
    assert results[0][0].dtype == x.dtype
    for actual, expected in zip(*results, strict=True):
        # Gradients of sums over a batch have larger values.
        scale = float(expected.detach().abs().max().clamp(min=1))
        close(actual / scale, expected / scale, tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BASES)
def test_agrees_with_reference(name, dtype):
    tolerance = DTYPES[dtype]
    for num_dims, shape in SHAPES.items():
        if name == "instance_norm" and num_dims == 2:
            continue
        layer, reference = pair(name, num_dims, dtype)
        for training in (True, False):
            for module in (layer, reference):
                module.train(training)
            for seed in range(3):
                assert_same(layer, reference, scattered(shape, dtype, seed), tolerance)
                for buffer, value in layer.named_buffers():
                    if buffer.startswith("running"):
                        expected = getattr(reference, buffer)
                        close(value.flatten(), expected, tolerance)


@pytest.mark.parametrize("norm", [BatchNorm, ManualBatchNorm])
def test_options_of_batch_norm(norm):
    for options in ({"momentum": 0.3, "eps": 0.1}, {"momentum": None}):
        layer = norm(num_features=6, num_dims=3, **options).double()
        reference = nn.BatchNorm1d(6, **options).double()
        for seed, size in enumerate((11, 7, 0, 5)):
            x = scattered((size, 6, 4), torch.float64, seed)
            close(layer(x), reference(x), 1e-12)
        assert layer.state_dict().keys() == reference.state_dict().keys()
        for buffer, value in reference.state_dict().items():
            close(layer.state_dict()[buffer], value, 1e-12)

        layer.reset_running_stats()
        reference.reset_running_stats()
        for buffer, value in reference.state_dict().items():
            assert torch.equal(layer.state_dict()[buffer], value)
        with pytest.raises(ValueError, match="more than one value"):
            norm(num_features=6, num_dims=2)(torch.ones(1, 6))


def test_second_derivatives_of_the_manual_batch_norm():
    layer = ManualBatchNorm(num_features=2, num_dims=3).double()
    x = scattered((3, 2, 2), torch.float64).requires_grad_()
    weight, bias = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def compute(x, weight, bias):
        parameters = {"weight": weight, "bias": bias}
        return torch.func.functional_call(layer, parameters, (x,))

    for training in (True, False):
        layer.train(training)
        assert torch.autograd.gradcheck(compute, (x, weight, bias))
        assert torch.autograd.gradgradcheck(compute, (x, weight, bias))


def test_warmup_of_batch_renorm():
    """During the first batch of a warmup, r = 1 and d = 0, which is batch normalization."""
    layer = BASES["batch_renorm"](num_features=6, num_dims=4, warmup=4).double()
    x = scattered(SHAPES[4], torch.float64)
    close(layer(x), nn.BatchNorm2d(6).double()(x), 1e-12)
    # In the third batch, half of the warmup is over.
    layer(x)
    mean, std = layer.running_mean.clone(), layer.running_std.clone()
    batch_mean, batch_std = x.mean((0, 2, 3)), (x.var((0, 2, 3), correction=0) + 1e-5).sqrt()
    r = (batch_std / std.flatten()).clip(1 / 2, 2).view(mean.shape)
    d = ((batch_mean - mean.flatten()) / std.flatten()).clip(-2.5, 2.5).view(mean.shape)
    close(layer(x), nn.BatchNorm2d(6).double()(x) * r + d, 1e-12)


def synchronized_shards(rank, port, folder):
    """Process the shard of this rank, and store output, gradients and running statistics."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    layer, _ = pair("batch_norm", 4, torch.float64)
    layer.sync_batchnorm = True
    x = scattered(SHAPES[4], torch.float64)
    weights = scattered(SHAPES[4], torch.float64, seed=1)
    shard = slice(0, 3) if rank == 0 else slice(3, None)
    own = x[shard].requires_grad_()
    y = layer(own)
    (y * weights[shard]).sum().backward()
    torch.save([y.detach(), own.grad, *layer.state_dict().values()], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_synchronized_batch_norm(tmp_path):
    processes.start(synchronized_shards, (processes.free_port(), str(tmp_path)), 2)
    _, reference = pair("batch_norm", 4, torch.float64)
    x = scattered(SHAPES[4], torch.float64).requires_grad_()
    y = reference(x)
    (y * scattered(SHAPES[4], torch.float64, seed=1)).sum().backward()
    shards = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    close(torch.cat([shard[0] for shard in shards]), y, 1e-12)
    close(torch.cat([shard[1] for shard in shards]), x.grad, 1e-12)
    for shard in shards:
        for actual, expected in zip(shard[2:], reference.state_dict().values(), strict=True):
            close(actual, expected, 1e-12)
