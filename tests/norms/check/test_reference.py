"""The reference formulas, against PyTorch's functions."""

import pytest
import torch
from torch.nn import functional as F

from bn_lightning.norms.check import reference
from bn_lightning.norms.check.reference import CORRECT, WRONG, Groups

SHAPE = (8, 6, 5, 3)
ALL = tuple((0,) * size for size in SHAPE)
CHANNELS, SAMPLES = tuple(range(6)), tuple(range(8))
GROUPS = {
    "batch": Groups((ALL[0], CHANNELS, *ALL[2:])),
    "layer": Groups((SAMPLES, *ALL[1:])),
    "instance": Groups((SAMPLES, CHANNELS, *ALL[2:])),
    "group": Groups((SAMPLES, (0, 0, 0, 1, 1, 1), *ALL[2:])),
}


def torch_output(kind, x, eps):
    return {
        "batch": lambda: F.batch_norm(x, None, None, training=True, eps=eps),
        "layer": lambda: F.layer_norm(x, x.shape[1:], eps=eps),
        "instance": lambda: F.instance_norm(x, eps=eps),
        "group": lambda: F.group_norm(x, 2, eps=eps),
    }[kind]()


def inputs():
    return 3 * torch.randn(SHAPE, dtype=torch.float64) + torch.randn(8, 6, 1, 1).double()


@pytest.mark.parametrize("kind", GROUPS)
def test_a_fit_finds_gamma_beta_and_eps(kind):
    gamma, beta = torch.randn(2, 6, 1, 1).double()
    samples = []
    for scale in (1, 0.1):
        x = scale * inputs()
        y = torch_output(kind, x, 0.3) * gamma + beta
        samples.append((x, GROUPS[kind], y))
    found = reference.fit(samples, CORRECT, [1e-5, 0.3], 1e-9)
    assert (found.name, found.eps) == (reference.CENTRING, 0.3)
    assert found.residual < 1e-12
    torch.testing.assert_close(found.scale, gamma.flatten())
    torch.testing.assert_close(found.shift, beta.flatten())
    torch.testing.assert_close(found.output(x, GROUPS[kind]), y)


def test_an_unknown_eps_is_searched_for():
    x = inputs()
    sample = (x, GROUPS["layer"], torch_output("layer", x, 0.0123))
    found = reference.fit([sample], CORRECT, [1e-5], 1e-9)
    assert found.eps == pytest.approx(0.0123, rel=1e-2)
    assert found.residual < 1e-4


def test_gradients_flow_through_the_statistics():
    x = inputs().requires_grad_()
    g = torch.randn(SHAPE, dtype=torch.float64)
    (expected,) = torch.autograd.grad(torch_output("group", x, 1e-5), x, g)
    y = CORRECT[reference.CENTRING](x, *GROUPS["group"].moments(x), 1e-5)
    torch.testing.assert_close(torch.autograd.grad(y, x, g)[0], expected)


def test_moments_are_those_of_torch():
    x = inputs()
    mean, var, m = GROUPS["instance"].moments(x)
    expected = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
    torch.testing.assert_close((var, mean), tuple(t.expand_as(x) for t in expected))
    assert (m == 15).all()


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_told_from_the_correct_formulas(mistake):
    # Groups of different sizes, with deviations below and above the square root of eps.
    x = torch.cat([0.003 * inputs()[:3], 0.03 * inputs()[:5], inputs()])
    groups = Groups(((0,) * 3 + (1,) * 5 + (2,) * 8, *GROUPS["batch"].labels[1:]))
    y = WRONG[mistake](x, *groups.moments(x), 1e-3)
    sample = (x, groups, y)
    assert reference.fit([sample], CORRECT, [1e-3], 1e-9).residual > 1e-4
    assert reference.fit([sample], WRONG, [1e-3], 1e-9).name == mistake


def test_a_convolution_and_an_activation_are_not_affine_in_a_cell():
    x = inputs()
    normalized = torch_output("batch", x, 1e-5)
    for y, is_affine in ((2 * normalized + 1, True), (normalized.relu(), False)):
        sample = (x, GROUPS["batch"], y)
        assert reference.is_affine_in_each_cell([sample], True) == is_affine
