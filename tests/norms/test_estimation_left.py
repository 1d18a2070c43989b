"""Layers that the estimate of running statistics leaves, and when there is nothing to estimate."""

import pytest
import torch
import torchvision
from torch import nn

from bn_lightning import LeNet, UserError, estimate_statistics
from bn_lightning.norms.estimation import plan
from bn_lightning.norms.frozen import FrozenBatchNorm
from bn_lightning.norms.layer import BatchNorm
from bn_lightning.norms.renorm import BatchRenorm
from tests.support.pooled_statistics import assert_statistics, randomized


def batches_of():
    sizes = (7, 20, 1, 13)
    return [torch.randn(n, 3, 8, 6).double() * (1 + i) + i for i, n in enumerate(sizes)]


class TutorialNorm(nn.Module):
    """A layer as in section 8.5 of "Dive into Deep Learning", with buffers."""

    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("moving_mean", torch.full((1, channels, 1, 1), 0.5))
        self.register_buffer("moving_var", torch.ones(1, channels, 1, 1))

    def forward(self, x):
        if not torch.is_grad_enabled():
            return self.gamma * (x - self.moving_mean) / torch.sqrt(self.moving_var + 1e-5)
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True)
        self.moving_mean = (0.9 * self.moving_mean + 0.1 * mean).detach()
        self.moving_var = (0.9 * self.moving_var + 0.1 * var).detach()
        return self.gamma * (x - mean) / torch.sqrt(var + 1e-5)


LEFT = {
    "instance": (lambda: nn.InstanceNorm2d(3, track_running_stats=True), "over samples"),
    "torchvision": (lambda: torchvision.ops.FrozenBatchNorm2d(3), "fixed"),
    "frozen": (lambda: FrozenBatchNorm(3), "fixed"),
    "tutorial": (lambda: TutorialNorm(3), "no buffers running_mean and running_var"),
    "eval mode": (lambda: nn.BatchNorm2d(3).eval(), "eval mode, and the network in training"),
    "TorchScript": (lambda: torch.jit.script(nn.BatchNorm2d(3)), "TorchScript"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
@pytest.mark.parametrize("kind", LEFT)
def test_layer_that_is_left_is_named_and_unchanged(kind):
    make, reason = LEFT[kind]
    network = randomized(nn.Sequential(nn.Conv2d(3, 3, 1), make(), nn.BatchNorm2d(3))).double()
    before = [buffer.clone() for buffer in network[1].buffers()]
    tensors = [id(buffer) for buffer in network[1].buffers()]
    batches = batches_of()
    with torch.no_grad():
        # The layer that is left normalizes by its running statistics.
        network[1].training, was = False, network[1].training
        x = torch.cat([network[:2](x) for x in batches]).movedim(1, 0).flatten(1)
        network[1].training = was
    planned, report = plan(network), estimate_statistics(network, batches)
    assert planned == report
    assert report.estimated == ["2"]
    assert [*report.left] == ["1"]
    assert reason in report.left["1"]
    assert f"left: 1: {report.left['1']}" in str(report)
    if kind != "TorchScript":
        assert tensors == [id(buffer) for buffer in network[1].buffers()]
    assert all(map(torch.equal, before, network[1].buffers()))
    assert_statistics(network, {"2": (x.mean(1), x.var(1))})


class HasUnusedHead(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.unused = norm(3), randomized(norm(3))

    def forward(self, x):
        return self.norm(x)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNorm, BatchRenorm])
def test_layer_that_no_batch_reaches_is_left(norm):
    network = HasUnusedHead(norm).double()
    before = [buffer.clone() for buffer in network.unused.buffers()]
    report = estimate_statistics(network, batches_of())
    assert report.estimated == ["norm"]
    assert "fewer than 2 values" in report.left["unused"]
    assert all(map(torch.equal, before, network.unused.buffers()))


@pytest.mark.parametrize("norm", ["none", "layer", "group"])
def test_without_running_statistics_no_batch_is_read(norm):
    batches = iter(batches_of())
    report = estimate_statistics(LeNet(norm), batches)
    assert (report.estimated, report.left) == ([], {})
    assert "no layer with running statistics" in str(report)
    assert len([*batches]) == 4


@pytest.mark.parametrize("batches", [[], iter(())], ids=["list", "iterator"])
def test_no_batches_are_an_error(batches):
    network = randomized(BatchNorm(3).double())
    before = [buffer.clone() for buffer in network.buffers()]
    with pytest.raises(UserError, match="needs at least one batch"):
        estimate_statistics(network, batches)
    assert all(map(torch.equal, before, network.buffers()))
