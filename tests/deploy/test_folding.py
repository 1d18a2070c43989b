"""A module is folded if and only if it is an affine map per channel, whatever its class."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from bn_lightning.deploy.folding import fold
from bn_lightning.networks.resnet import ResNet
from bn_lightning.norms import registry
from bn_lightning.norms.replace import NormAct


class Repeated(nn.Sequential):
    """Calls module 0 twice. Folding module 1 into it would change the second call."""

    def forward(self, x):
        return self[0](self[1](self[0](x)))


class Residual(nn.Sequential):
    """Uses the output of module 0 twice."""

    def forward(self, x):
        x = self[0](x)
        return x + self[1](x)


class SharedLayer(nn.Sequential):
    """Calls module 0 twice, each time followed by another norm."""

    def forward(self, x):
        return self[2](self[0](self[1](self[0](x))))


class SharedNorm(nn.Sequential):
    """Calls module 1 twice, each time after another layer."""

    def forward(self, x):
        return self[1](self[2](self[1](self[0](x)).relu_()))


class ReadsWeight(nn.Sequential):
    """Uses the weight of module 0 outside of that module, too."""

    def forward(self, x):
        return self[1](self[0](x)) + nn.functional.linear(x, self[0].weight)


class InPlaceBehindIdentity(nn.Sequential):
    """Changes what module 1, a Dropout, returns: the output of module 0 itself."""

    def forward(self, x):
        x = self[0](x)
        self[1](x).relu_()
        return self[2](x)


class Standardized(nn.Conv2d):
    """A convolution with standardized weights: scaling them does not change its output."""

    def forward(self, x):
        mean, std = self.weight.mean((1, 2, 3), True), self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / std, self.bias)


class InFloat32Only(nn.Module):
    """Affine, but raises for the float64 probes."""

    def forward(self, x):
        if x.dtype != torch.float32:
            raise TypeError("float32 only")
        return 2 * x


class Doubles(nn.Module):
    """Affine, but computes with a scalar parameter instead of one value per channel."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.full((), 2.0))

    def forward(self, x):
        return x * self.gain + 0.25


CONVOLUTION = nn.Sequential(
    nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Dropout(), nn.Identity(), nn.ReLU()
)
GROUPS = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2), nn.BatchNorm1d(4))
OTHER_CHANNELS = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(3))
PER_SAMPLE = nn.Sequential(nn.Conv2d(2, 3, 3), nn.LayerNorm((3, 3, 3)))
WEIGHT_NORM = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)), nn.BatchNorm1d(3))
SPECTRAL_NORM = nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 3)), nn.BatchNorm1d(3))
DEPTHWISE = nn.Sequential(
    nn.Conv2d(3, 6, 3, groups=3, padding=1, padding_mode="circular", bias=False),
    nn.Identity(),
    nn.BatchNorm2d(6, affine=False),
    nn.ReLU(inplace=True),
)
BATCH_STATISTICS = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3, track_running_stats=False))
TRANSPOSED = nn.Sequential(nn.ConvTranspose2d(2, 4, 3, groups=2), nn.BatchNorm2d(4))
STANDARDIZED = nn.Sequential(Standardized(2, 3, 3), nn.BatchNorm2d(3))
COMPUTED = "is not folded: 0 does not use its weight and bias directly"
AFFINE_ON_X = nn.Sequential(nn.Linear(3, 3), nn.Hardtanh(-99, 99))


@pytest.mark.parametrize(
    ("network", "shape", "notes"),
    [
        (CONVOLUTION, (4, 2, 5, 5), ["1 is folded into 0"]),
        (GROUPS, (4, 4, 9), ["1 is folded into 0"]),
        (nn.Sequential(nn.Linear(3, 3), Doubles()), (4, 3), ["1 is folded into 0"]),
        (OTHER_CHANNELS, (2, 3, 6), ["1 (BatchNorm1d) is not folded: "]),
        (PER_SAMPLE, (4, 2, 5, 5), ["1 (LayerNorm) is not folded: "]),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)), (4, 3), ["1 (BatchNorm1d) is not folded: "]),
        (AFFINE_ON_X, (4, 3), []),
        (Residual(nn.Linear(3, 3), nn.BatchNorm1d(3)), (4, 3), ["1 (BatchNorm1d) is not folded: "]),
        (Repeated(nn.Linear(3, 3), nn.BatchNorm1d(3)), (4, 3), ["1 (BatchNorm1d) is not folded: "]),
        (
            SharedLayer(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)),
            (4, 3),
            [f"{i} (BatchNorm1d) is not folded: there is no layer" for i in (1, 2)],
        ),
        (
            SharedNorm(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)),
            (4, 3),
            [f"1 is folded into {i}" for i in (0, 2)],
        ),
        (
            ReadsWeight(nn.Linear(3, 3), nn.BatchNorm1d(3)),
            (4, 3),
            ["1 (BatchNorm1d) is not folded: there is no layer"],
        ),
        (
            InPlaceBehindIdentity(nn.Linear(3, 3), nn.Dropout(), nn.BatchNorm1d(3)),
            (4, 3),
            ["2 (BatchNorm1d) is not folded: there is no layer"],
        ),
        (DEPTHWISE, (4, 3, 5, 5), ["2 is folded into 0"]),
        (BATCH_STATISTICS, (4, 2, 5), ["1 (BatchNorm1d) is not folded: in eval mode, it is not"]),
        (TRANSPOSED, (4, 2, 5, 5), ["1 (BatchNorm2d) is not folded: there is no layer"]),
        (WEIGHT_NORM, (4, 3), [f"1 (BatchNorm1d) {COMPUTED}"]),
        (SPECTRAL_NORM, (4, 3), [f"1 (BatchNorm1d) {COMPUTED}"]),
        (STANDARDIZED, (4, 2, 5, 5), [f"1 (BatchNorm2d) {COMPUTED}"]),
        (
            nn.Sequential(nn.Linear(3, 3), NormAct(nn.BatchNorm1d(3), nn.ReLU(inplace=True))),
            (4, 3),
            ["1.0 is folded into 0"],
        ),
    ],
)
def test_affine_modules_are_folded_and_others_are_named(network, shape, notes):
    x = torch.randn(shape)
    for values in (*network.parameters(), *network.buffers()):
        if values.is_floating_point():
            values.data.uniform_(0.5, 2.0)
    before = {name: values.clone() for name, values in network.state_dict().items()}
    folded, found = fold(network.eval(), x)
    assert len(found) == len(notes) and all(map(str.startswith, found, notes)), found
    truth = copy.deepcopy(network).double()(x.double())
    torch.testing.assert_close(folded(x).double(), truth, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(values, before[name]) for name, values in network.state_dict().items())


def test_a_module_that_refuses_float64_is_left():
    x = torch.randn(4, 3)
    network = nn.Sequential(nn.Linear(3, 3), InFloat32Only())
    folded, (note,) = fold(network, x)
    assert note.startswith("1 (InFloat32Only) is not folded: ")
    assert torch.equal(folded(x), network(x))


@torch.no_grad()  # for `article`
@pytest.mark.parametrize("norm", ["custom", "builtin", "renorm", "article", "ghost", "frozen"])
def test_norms_of_a_residual_network_are_folded(norm):
    network = ResNet(1, (28, 28), 10, registry.factory(norm), depth=20, width=4).eval()
    for name, values in network.named_buffers():
        if values.is_floating_point():
            values.uniform_(-1, 1) if "mean" in name else values.uniform_(0.5, 2)
    x = torch.rand(4, 1, 28, 28)
    folded, notes = fold(network, x)
    assert notes == ["19 norms are folded into the layers before them"]
    assert {type(m) for m in folded.modules() if not list(m.children())} == {
        nn.Conv2d, nn.Linear, nn.ReLU
    }  # fmt: skip
    truth = copy.deepcopy(network).double()(x.double())
    torch.testing.assert_close(folded(x).double(), truth, rtol=1e-4, atol=1e-5)


def test_many_modules_that_are_not_folded_have_one_note():
    layers = [nn.Linear(3, 3), nn.ReLU(), nn.BatchNorm1d(3)] * 9
    _, notes = fold(nn.Sequential(*map(copy.deepcopy, layers)).eval(), torch.rand(4, 3))
    reason = "there is no layer that it can be folded into"
    assert notes == [f"2 (BatchNorm1d) is not folded, and 8 others like it: {reason}"]
