"""A module is folded if and only if it is an affine map per channel, whatever its class."""

import pytest
import torch
from torch import nn

from bn_lightning.deploy.folding import fold


class Repeated(nn.Sequential):
    """Calls module 0 twice. Folding module 1 into it would change the second call."""

    def forward(self, x):
        return self[0](self[1](self[0](x)))


class Residual(nn.Sequential):
    """Uses the output of module 0 twice."""

    def forward(self, x):
        x = self[0](x)
        return x + self[1](x)


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
IN_PLACE = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True))
GROUPS = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2), nn.BatchNorm1d(4))
OTHER_CHANNELS = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(3))
PER_SAMPLE = nn.Sequential(nn.Conv2d(2, 3, 3), nn.LayerNorm((3, 3, 3)))
AFFINE_ON_X = nn.Sequential(nn.Linear(3, 3), nn.Hardtanh(-99, 99))


@pytest.mark.parametrize(
    ("network", "shape", "notes"),
    [
        (CONVOLUTION, (4, 2, 5, 5), [f"{i} is folded into 0" for i in (1, 2, 3)]),
        (IN_PLACE, (4, 2, 5, 5), ["1 is folded into 0"]),
        (GROUPS, (4, 4, 9), ["1 is folded into 0"]),
        (nn.Sequential(nn.Linear(3, 3), Doubles()), (4, 3), ["1 is folded into 0"]),
        (
            nn.Sequential(nn.Linear(3, 3), InFloat32Only()),
            (4, 3),
            ["1 (InFloat32Only) is not folded: "],
        ),
        (OTHER_CHANNELS, (2, 3, 6), ["1 (BatchNorm1d) is not folded: "]),
        (PER_SAMPLE, (4, 2, 5, 5), ["1 (LayerNorm) is not folded: "]),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)), (4, 3), ["1 (BatchNorm1d) is not folded: "]),
        (AFFINE_ON_X, (4, 3), []),
        (Residual(nn.Linear(3, 3), nn.BatchNorm1d(3)), (4, 3), ["1 (BatchNorm1d) is not folded: "]),
        (Repeated(nn.Linear(3, 3), nn.BatchNorm1d(3)), (4, 3), ["1 (BatchNorm1d) is not folded: "]),
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
    torch.testing.assert_close(folded(x), network(x))
    assert all(torch.equal(values, before[name]) for name, values in network.state_dict().items())
