"""Measurements of one step, compared with closed forms."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from bn_lightning.monitoring import measurements
from bn_lightning.monitoring.measurements import Measurements


@pytest.mark.parametrize("count", [11, 19, 20, 34, 121])
@pytest.mark.parametrize("size", [2, 10])
def test_a_selection_is_evenly_spaced_from_first_to_last(count, size):
    chosen = measurements.selection(range(count), size)
    gaps = {after - before for before, after in pairwise(chosen)}
    assert (len(chosen), chosen[0], chosen[-1]) == (size, 0, count - 1)
    assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("count", [0, 1, 9, 10])
def test_a_small_number_of_layers_is_selected_completely(count):
    assert measurements.selection(range(count), 10) == [*range(count)]


@pytest.mark.parametrize("shape", [(50, 3), (20, 3, 4), (10, 3, 4, 5), (5, 3, 4, 5, 2)])
def test_batch_statistics_are_computed_per_channel(shape):
    x = torch.randn(shape, generator=torch.manual_seed(0)) * 3 + 5
    mean, var = measurements.batch_statistics(x)
    dims = [d for d in range(x.dim()) if d != 1]
    expected_var, expected_mean = torch.var_mean(x.double(), dims, correction=0)
    torch.testing.assert_close(mean.double(), expected_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var.double(), expected_var, rtol=1e-5, atol=1e-6)


def test_batch_statistics_of_16_bits_are_computed_in_float32():
    x = (torch.randn(1_000, 2, generator=torch.manual_seed(0)) + 100).bfloat16()
    mean, var = measurements.batch_statistics(x)
    assert mean.dtype == var.dtype == torch.float32
    torch.testing.assert_close(mean, x.float().mean(0))
    torch.testing.assert_close(var, x.float().var(0, correction=0))


def test_running_lag_equals_its_closed_form():
    eps = measurements.EPS
    running_mean, running_var = torch.tensor([0.0, 10.0]), torch.tensor([4.0, 9.0]) - eps
    # The distances are 3 and 4 standard deviations: the root mean square is sqrt((9 + 16) / 2).
    mean = torch.tensor([6.0, -2.0])
    # The variances are 2 and 1/8 of the running ones: sqrt((1 + 9) / 2).
    var = torch.tensor([8.0, 9 / 8]) - eps
    lag = measurements.running_lag(mean, var, running_mean, running_var)
    assert lag == pytest.approx((math.sqrt(12.5), math.sqrt(5)), rel=1e-5)


def test_equal_statistics_have_no_lag():
    mean, var = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 3.0])
    assert measurements.running_lag(mean, var, mean, var) == (0, 0)


def test_all_values_of_a_small_layer_are_sampled():
    x = torch.arange(100.0).view(4, 25)
    assert torch.equal(measurements.sample(x), x.flatten())


@pytest.mark.parametrize("shape", [(), (70_001,), (64, 3, 40, 30)])
def test_a_sample_has_evenly_spaced_values(shape):
    x = torch.randn(shape)
    if x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    stride = max(1, x.numel() // measurements.SAMPLE) | 1
    assert torch.equal(measurements.sample(x), x.flatten()[::stride])


def test_a_sample_contains_all_positions():
    columns = torch.arange(64).expand(1_024, 64).contiguous()
    found = measurements.sample(columns.double())
    assert found.dtype == torch.float32
    assert measurements.SAMPLE * 0.9 < len(found) < measurements.SAMPLE * 2
    counts = found.int().bincount(minlength=64)
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(
    ("activation", "derivative"),
    [
        (nn.Sigmoid(), lambda x: x.sigmoid() * (1 - x.sigmoid())),
        (nn.Tanh(), lambda x: 1 - x.tanh().square()),
        (nn.ReLU(), lambda x: (x > 0).float()),
        (nn.ReLU(inplace=True), lambda x: (x > 0).float()),
        (nn.Tanhshrink(), lambda x: x.tanh().square()),
        (nn.Softsign(), lambda x: 1 / (1 + x.abs()).square()),
    ],
    ids=lambda value: repr(value) if isinstance(value, nn.Module) else "",
)
def test_slopes_equal_the_derivatives(activation, derivative):
    x = torch.linspace(-5, 5, 1_000)
    before = x.clone()
    with torch.no_grad():
        found = measurements.slope(activation, x)
    torch.testing.assert_close(found, derivative(x))
    assert torch.equal(x, before)


def test_slopes_are_absolute():
    class Falling(nn.Module):
        def forward(self, x):
            return -3 * x

    assert torch.equal(measurements.slope(Falling(), torch.ones(2)), torch.full((2,), 3.0))


def test_activations_are_the_elementwise_modules_of_pytorch():
    activations = (nn.ReLU(), nn.Sigmoid(), nn.GELU(), nn.Hardtanh(), nn.LeakyReLU())
    others = (nn.Softmax(1), nn.GLU(), nn.PReLU(), nn.RReLU(), nn.Linear(2, 2), nn.Dropout())
    assert all(measurements.is_activation(module) for module in activations)
    assert not any(measurements.is_activation(module) for module in others)


@pytest.mark.parametrize(
    ("activation", "edges"),
    [
        # sigmoid'(x) = s (1 - s) is 0.05 / 4 at |x| = 4.3567.
        (nn.Sigmoid(), (-4.3567, 4.3567)),
        # tanh'(x) = 1 - tanh(x)^2 is 0.05 at |x| = 2.1783.
        (nn.Tanh(), (-2.1783, 2.1783)),
        (nn.ReLU(), (0, math.inf)),
        (nn.ReLU(inplace=True), (0, math.inf)),
        (nn.Hardtanh(), (-1, 1)),
    ],
    ids=repr,
)
def test_saturation_and_percentiles_equal_their_closed_form(activation, edges):
    values = torch.linspace(-10, 10, 8_001)
    measured = Measurements()
    hook = activation.register_forward_pre_hook(measured.keep_activation_input, with_kwargs=True)
    activation(values.clone())
    hook.remove()
    measured.measure_activations()
    saturated = ((values < edges[0]) | (values > edges[1])).double().mean().item()
    assert measured.scalars["saturated/1"] == pytest.approx(saturated, abs=0.001)
    for percentile in (15, 50, 85):
        level = measured.scalars[f"activation_input/1/p{percentile}"]
        assert level == pytest.approx(percentile / 5 - 10, abs=0.01)


def test_activations_are_numbered_in_execution_order():
    measured = Measurements()
    for value in (3.0, 1.0):
        measured.keep_activation_input(nn.ReLU(), (), {"input": torch.full((5,), value)})
    measured.keep_activation_input(nn.ReLU(), (torch.empty(0),), {})
    measured.keep_activation_input(nn.ReLU(), (torch.ones(3, dtype=torch.long),), {})
    measured.measure_activations()
    medians = {name: v for name, v in measured.scalars.items() if name.endswith("p50")}
    assert medians == {"activation_input/1/p50": 3.0, "activation_input/2/p50": 1.0}


def test_a_norm_layer_is_measured_before_its_first_call_in_a_step():
    measured, norm = Measurements(), nn.BatchNorm1d(2)
    nn.init.constant_(norm.weight, 3.0)
    first, second = torch.tensor([[1.0, 0.0], [3.0, 2.0]]), torch.zeros(2, 2)
    measured.begin_step(with_histograms=True)
    for x in (first, second):
        measured.measure_norm("a", norm, (x,), {})
        norm(x)
    assert measured.scalars == {
        "channel_0/a/gamma": 3.0,
        "channel_0/a/beta": 0.0,
        "channel_0/a/running_mean": 0.0,
        "channel_0/a/running_var": 1.0,
        "channel_0/a/batch_mean": 2.0,
        "channel_0/a/batch_var": 1.0,
        "running_lag/a/mean": pytest.approx(math.sqrt((4 + 1) / 2), rel=1e-4),
        "running_lag/a/var": 0.0,
    }
    found = {name: values.tolist() for name, values in measured.histograms.items()}
    assert found == {
        "gamma/a": [3.0, 3.0],
        "beta/a": [0.0, 0.0],
        "running_mean/a": [0.0, 0.0],
        "running_var/a": [1.0, 1.0],
        "batch_mean/a": [2.0, 1.0],
        "batch_var/a": [1.0, 1.0],
    }
    measured.begin_step(with_histograms=False)
    measured.measure_norm("a", norm, (second,), {})
    assert measured.scalars["channel_0/a/batch_mean"] == 0
    assert measured.histograms == {}


def test_without_matching_channels_only_gamma_and_beta_are_measured():
    measured, norm = Measurements(), nn.LayerNorm(4)
    measured.measure_norm("a", norm, (torch.zeros(5, 3, 4),), {})
    assert measured.scalars == {"channel_0/a/gamma": 1.0, "channel_0/a/beta": 0.0}


def test_gradient_norms_are_measured_by_layer_and_in_total():
    network = nn.ModuleDict(
        {"network": nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})}
    )
    a, b = network["network"].values()
    b.weight = a.weight  # shared, counts for the first layer
    a.weight.grad, a.bias.grad, b.bias.grad = (torch.full(p, 1.0) for p in ((1, 1), (1,), (1,)))
    a.weight.grad *= 3
    a.bias.grad *= 4
    b.bias.grad *= 12
    measured = Measurements()
    first = torch.optim.SGD(a.parameters(), 0.1)
    measured.measure_gradients(network, first)
    assert measured.has_gradients
    assert measured.scalars == pytest.approx({"gradient_norm/a": 5.0, "gradient_norm/all": 5.0})
    a.bias.grad *= 100
    measured.measure_gradients(network, first)  # LBFGS does this
    measured.measure_gradients(network, torch.optim.SGD([b.bias], 0.1))
    expected = {"gradient_norm/a": 5.0, "gradient_norm/b": 12.0, "gradient_norm/all": 13.0}
    assert measured.scalars == pytest.approx(expected)
    scalars, histograms = measured.take()
    assert scalars == pytest.approx(expected) and histograms == {}
    assert measured.scalars == {} and not measured.has_gradients


def test_in_a_large_network_gradients_of_some_norms_and_other_layers_are_measured():
    layers = [layer for _ in range(7) for layer in (nn.Linear(3, 3), nn.BatchNorm1d(3))]
    network = nn.Sequential(*layers)
    network(torch.randn(5, 3, generator=torch.manual_seed(0))).square().sum().backward()
    measured = Measurements(max_layers=3)
    measured.begin_step(False, norms=[f"{n}" for n in range(1, 14, 2)])
    measured.measure_gradients(network, torch.optim.SGD(network.parameters(), 0.1))
    expected = {
        f"gradient_norm/{n}": math.hypot(*(p.grad.norm().item() for p in layers[n].parameters()))
        for n in (0, 1, 6, 7, 12, 13)
    }
    of_all = [p.grad.norm().item() for p in network.parameters()]
    assert measured.scalars == pytest.approx(
        {**expected, "gradient_norm/all": math.hypot(*of_all)}, rel=1e-5
    )
    assert measured.other_layers == [f"{n}" for n in range(0, 14, 2)]
