"""Replacement of the norm layers of any network."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from bn_lightning import BatchNorm, UserError, replace_norms
from bn_lightning.norms import article, registry
from bn_lightning.norms.renorm import BatchRenorm


class Twice(nn.Module):
    """A network that uses one norm layer under two names, and one in a plain attribute."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.first = self.second = nn.BatchNorm2d(6)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(6 * 4 * 5, 4), nn.BatchNorm1d(4))

    def forward(self, x):
        return self.head(self.second(self.first(self.conv(x))))


class BatchNormAct(nn.BatchNorm2d):
    """A fused layer, like that of timm."""

    def __init__(self, num_features):
        super().__init__(num_features)
        self.drop, self.act = nn.Dropout(0.0), nn.ReLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class RunningRMS(nn.Module):
    """A layer of a user: it divides by a running root mean square."""

    def __init__(self, num_features, eps=1e-3):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x):
        return x * (self.weight / (self.running_var + self.eps).sqrt()).view(1, -1, 1, 1)


def shaken(network, seed=0):
    """Return the network with random parameters and statistics, and a different mode per layer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5, generator=generator)
    return network


def x(*shape, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def test_parameters_and_statistics_are_the_same_tensors():
    network = shaken(Twice())
    before = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    expected = copy.deepcopy(network).eval()(x(2, 3, 6, 7))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    report = replace_norms(network, "custom")
    assert [(r.layer, r.old, r.new) for r in report] == [
        ("first", "BatchNorm2d", "BatchNorm"),
        ("second", "BatchNorm2d", "BatchNorm"),
        ("head.2", "BatchNorm1d", "BatchNorm"),
    ]
    assert network.first is network.second
    after = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    torch.testing.assert_close(network.eval()(x(2, 3, 6, 7)), expected)
    # The optimizer still trains the parameters.
    network.train()(x(4, 3, 6, 7)).square().sum().backward()
    gamma = network.first.weight.clone()
    optimizer.step()
    assert not torch.equal(network.first.weight, gamma)


def test_settings_hooks_mode_dtype_and_frozen_parameters_are_kept():
    norm = nn.BatchNorm2d(6, eps=0.3, momentum=0.02, dtype=torch.float64).eval()
    norm.weight.requires_grad_(False)
    network = nn.Sequential(norm, nn.ReLU())
    calls = []
    handle = norm.register_forward_hook(lambda *_: calls.append("forward"))
    norm.register_full_backward_hook(lambda *_: calls.append("backward"))
    replace_norms(network, "custom")
    new = network[0]
    assert (new.eps, new.momentum, new.num_dims, new.training) == (0.3, 0.02, 4, False)
    assert not new.weight.requires_grad and new.running_var.dtype == torch.float64
    network(x(2, 6, 3, 4, dtype=torch.float64).requires_grad_()).sum().backward()
    assert calls == ["forward", "backward"]
    handle.remove()
    network(x(2, 6, 3, 4, dtype=torch.float64))
    assert calls == ["forward", "backward"]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"affine": False}, {"running_mean", "running_var", "num_batches_tracked"}),
        ({"track_running_stats": False}, {"weight", "bias"}),
        ({"momentum": None}, None),
        pytest.param(
            {"bias": False},
            {"weight", "running_mean", "running_var", "num_batches_tracked"},
            marks=pytest.mark.skipif(
                "bias" not in inspect.signature(nn.BatchNorm2d).parameters,
                reason="PyTorch 2.11 has no such option",
            ),
        ),
    ],
)
def test_options_of_batch_norm_are_kept(options, names):
    old = shaken(nn.Sequential(nn.BatchNorm2d(6, **options)))
    new = copy.deepcopy(old)
    replace_norms(new, "custom")
    assert names is None or set(new[0].state_dict()) == names
    for _ in range(3):
        torch.testing.assert_close(new(x(5, 6, 3, 4)), old(x(5, 6, 3, 4)))
    torch.testing.assert_close(new.state_dict(), old.state_dict())


def test_norm_args_take_precedence():
    network = nn.Sequential(nn.BatchNorm2d(6, eps=0.3))
    replace_norms(network, "custom", {"eps": 0.25, "momentum": 0.5})
    assert (network[0].eps, network[0].momentum) == (0.25, 0.5)


@pytest.mark.parametrize("norm", [n for n in registry.NORMS if n != "builtin"])
def test_builtin_restores_the_layers(norm):
    network = nn.Sequential(
        nn.BatchNorm2d(6, eps=0.3, momentum=0.2),
        nn.GroupNorm(3, 6),
        nn.InstanceNorm2d(6, affine=True),
        BatchNormAct(6),
        nn.SyncBatchNorm(6),
        RunningRMS(6),
    )
    shaken(network)
    before = copy.deepcopy(network)
    replace_norms(network, norm, example=x(2, 6, 5, 4))
    assert [type(layer) for layer in network] != [type(layer) for layer in before]
    network = pickle.loads(pickle.dumps(copy.deepcopy(network)))
    replace_norms(network, "builtin")
    assert [type(layer) for layer in network] == [type(layer) for layer in before]
    assert repr(network) == repr(before)
    assert list(network.state_dict()) == list(before.state_dict())
    for name, value in before.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name


@pytest.mark.parametrize("norm", ["frozen", "layer", "rms", "none"])
def test_a_replacement_can_be_replaced_again(norm):
    # Without gamma, the new layers do not have the number of channels as a tensor.
    network = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 5), nn.BatchNorm1d(5, affine=False))
    shaken(network)
    before, batch = copy.deepcopy(network), x(3, 6)
    replace_norms(network, norm, example=batch)
    again = copy.deepcopy(network)
    report = replace_norms(again, "ghost", example=batch)
    assert [row.new for row in report] == ["GhostBatchNorm"] * 2
    assert [again[i].num_features for i in (0, 2)] == [6, 5]
    replace_norms(network, "builtin", example=batch)
    assert repr(network) == repr(before)
    torch.testing.assert_close(network.state_dict(), before.state_dict())


def test_instance_norm_has_no_running_statistics_after_a_replacement():
    network = shaken(nn.Sequential(nn.BatchNorm2d(6, eps=0.3, momentum=0.2)))
    gamma = network[0].weight
    replace_norms(network, "instance")
    assert (network[0].eps, network[0].running_mean) == (0.3, None)
    assert network[0].weight is gamma
    with pytest.raises(UserError, match="Layer 0, a BatchNorm1d: The norm 'instance' cannot be"):
        replace_norms(nn.Sequential(nn.BatchNorm1d(6)), "instance", example=x(3, 6))


def test_training_after_the_replacement_is_kept_by_builtin():
    network = nn.Sequential(nn.BatchNorm2d(6), BatchNormAct(6))
    reference = copy.deepcopy(network)
    replace_norms(network, "custom")
    for trained in (network, reference):
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        for seed in range(3):
            optimizer.zero_grad()
            trained(x(5, 6, 3, 4, seed=seed)).pow(3).mean().backward()
            optimizer.step()
    replace_norms(network, "builtin")
    torch.testing.assert_close(network.state_dict(), reference.state_dict())


def test_builtin_leaves_pytorchs_layers_and_converts_ours():
    network = nn.Sequential(nn.BatchNorm2d(6), BatchNorm(6, num_dims=5), nn.BatchNorm1d(6))
    first = network[0]
    report = replace_norms(network, "builtin")
    assert network[0] is first and type(network[1]) is nn.BatchNorm3d
    assert [row.reason for row in report] == ["it is PyTorch's own", "", "it is PyTorch's own"]


def test_conventions_of_other_norms_are_converted():
    old = shaken(nn.Sequential(nn.BatchNorm2d(6, eps=0.1, momentum=0.2)))
    expected = copy.deepcopy(old).eval()(x(2, 6, 5, 4))
    for norm, kind in (("article", article.BatchNorm), ("renorm", BatchRenorm)):
        network = copy.deepcopy(old)
        replace_norms(network, norm)
        assert type(network[0]) is kind
        assert network[0].momentum == (0.8 if norm == "article" else 0.2)
        with torch.no_grad():
            torch.testing.assert_close(network.eval()(x(2, 6, 5, 4)), expected)


def test_the_activation_of_a_fused_layer_is_kept():
    network = shaken(nn.Sequential(BatchNormAct(6)))
    expected = copy.deepcopy(network).eval()(x(2, 6, 5, 4))
    [row] = replace_norms(network, "custom")
    assert (row.old, row.new) == ("BatchNormAct", "NormAct")
    assert expected.min() == 0
    torch.testing.assert_close(network.eval()(x(2, 6, 5, 4)), expected)
    [row] = replace_norms(network, "group")
    assert [type(layer) for layer in network[0]] == [nn.GroupNorm, nn.Dropout, nn.ReLU]


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.LayerNorm(4), "normalizes the last dimensions"),
        (nn.RMSNorm(4), "normalizes the last dimensions"),
        (nn.LazyBatchNorm2d(), "its size is unknown before the first forward pass"),
        (parametrizations.weight_norm(nn.GroupNorm(2, 6)), "its parameters are parametrized"),
    ],
)
def test_other_layers_are_left_with_a_reason(layer, reason):
    network = nn.Sequential(layer, nn.BatchNorm2d(6))
    report = replace_norms(network, "custom")
    assert network[0] is layer and report[0].new is None
    assert reason in report[0].reason
    assert reason in str(report) and "BatchNorm2d" in str(report)


def test_a_layer_that_normalizes_another_dimension_is_left():
    class LastDimension(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x.movedim(-1, 1)).movedim(1, -1)

    network = nn.Sequential(LastDimension(6), nn.BatchNorm1d(4))
    report = replace_norms(network, "custom", example=x(2, 4, 6))
    assert report[0].reason == "it does not normalize dimension 1 of its input (2, 4, 6)"
    assert type(network[1]) is BatchNorm


def test_constants_of_the_data_are_no_running_statistics():
    class Standardize(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3, 1, 1))
            self.register_buffer("std", torch.ones(3, 1, 1))

    network = nn.Sequential(Standardize(), nn.BatchNorm2d(3))
    assert [row.layer for row in replace_norms(network, "custom")] == ["1"]


def needy(num_features, num_dims, eps=0.1):
    assert num_dims in (2, 3, 4)
    return BatchNorm(num_features, eps=eps, num_dims=num_dims)


def test_a_norm_that_needs_num_dims_takes_it_from_the_example():
    network = nn.Sequential(
        nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.Flatten(), nn.Linear(24, 5), nn.BatchNorm1d(5)
    ).train()
    network[2].eval()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(UserError, match=r"Layer 1, a BatchNorm1d: .*'needy' needs .*example"):
        replace_norms(network, needy)
    assert type(network[1]) is nn.BatchNorm1d
    replace_norms(network, needy, example=x(2, 3, 6))
    assert (network[1].num_dims, network[4].num_dims) == (3, 2)
    # The forward pass of the example changed nothing.
    assert [module.training for module in network] == [True, True, False, True, True]
    assert all(torch.equal(v, before[name]) for name, v in network.state_dict().items())
    assert network[1].eps == 1e-5  # that of the old layer


def test_a_failure_leaves_the_network_unchanged():
    network = nn.Sequential(nn.BatchNorm2d(6), nn.BatchNorm2d(7))
    layers = [*network]
    with pytest.raises(UserError, match="Layer 1, a BatchNorm2d: num_groups is 2"):
        replace_norms(network, "group")
    assert [*network] == layers


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(nn.Linear(3, 4)), "Sequential has no norm layer that can be replaced"),
        (nn.Sequential(nn.LayerNorm(4)), r"(?s)no norm layer that can be .*last dimensions"),
        (nn.BatchNorm2d(3), r"The network is a norm layer, BatchNorm2d.*torch.nn.Sequential"),
    ],
)
def test_a_network_without_layers_to_replace_is_refused(network, message):
    with pytest.raises(UserError, match=message):
        replace_norms(network, "custom")


def test_an_unknown_norm_or_argument_is_refused():
    network = nn.Sequential(nn.BatchNorm2d(6))
    with pytest.raises(UserError, match="Unknown norm 'batch'"):
        replace_norms(network, "batch")
    with pytest.raises(UserError, match="Did you mean eps"):
        replace_norms(network, "custom", {"epsilon": 1})


def test_other_weights_do_not_depend_on_the_norm():
    class Random(nn.Module):
        def __init__(self, num_features, num_dims=None):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(num_features))

    draws = []
    for norm in ("custom", Random):
        torch.manual_seed(0)
        replace_norms(nn.Sequential(nn.BatchNorm2d(6)), norm)
        draws.append(torch.rand(()))
    assert draws[0] == draws[1]


def test_layers_on_another_device_stay_there():
    network = nn.Sequential(nn.InstanceNorm2d(6), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)).to("meta")
    replace_norms(network, "custom")
    assert {tensor.device.type for tensor in network.state_dict().values()} == {"meta"}
