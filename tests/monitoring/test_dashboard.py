"""Output to TensorBoard."""

import re
import warnings

import pytest
import torch
from torch import nn

from bn_lightning.monitoring import dashboard
from tests.conftest import BRIEF
from tests.support.logs import events_in


def test_a_run_writes_histograms_graph_and_layout(trained):
    folder, _ = trained
    events = events_in(folder)
    tags = events.Tags()
    kinds = ("gamma", "beta", "batch_mean", "running_var")
    assert {f"{what}/norm{n}" for what in kinds for n in (1, 2, 3, 4)} <= set(tags["histograms"])
    assert tags["graph"]
    graph = events.Graph()
    assert any("BatchNorm[norm1]" in node.name for node in graph.node)
    assert [event.step for event in events.Scalars("activation_input/4/p50")] == [0]
    assert len(events.Tensors("custom_scalars__config__")) == 1
    histograms = events.Histograms("gamma/norm1")
    assert [len(histograms), histograms[0].histogram_value.num] == [1, 6]


TAGS = [
    "steps_per_second",
    "channel_0/norm1/gamma",
    "channel_0/norm1/batch_mean",
    "activation_input/1/p15",
    "activation_input/1/p50",
    "activation_input/2/p15",
    "saturated/1",
    "gradient_norm/all",
]


def test_charts_of_a_network_with_norm_layers():
    expected = {
        "Training": {
            "loss": ["Multiline", ["train_loss$", "train_loss_epoch", "val_loss"]],
            "acc": ["Multiline", ["train_acc$", "val_acc$"]],
            "top_5": ["Multiline", ["train_top_5$", "val_top_5$"]],
            "learning rate": ["Multiline", ["lr-.*"]],
        },
        dashboard.INPUTS: {
            "activation 2": ["Margin", [f"activation_input/2/{p}" for p in ("p50", "p15", "p85")]],
            "activation 1": ["Margin", [f"activation_input/1/{p}" for p in ("p50", "p15", "p85")]],
        },
        "Saturated activations": {
            "fraction of the inputs, by activation": ["Multiline", ["saturated/.*"]]
        },
        "Gradient norms": {
            "all parameters": ["Multiline", ["gradient_norm/all$"]],
            "norm layers": ["Multiline", ["gradient_norm/(norm1)$"]],
            "other layers": ["Multiline", ["gradient_norm/(?!(all|norm1)$)"]],
        },
        "gamma and beta, channel 0": {
            "gamma": ["Multiline", ["channel_0/.*/gamma"]],
            "beta": ["Multiline", ["channel_0/.*/beta"]],
        },
        "Lag of the running statistics": {
            "mean: behind one batch, in running standard deviations": [
                "Multiline",
                ["running_lag/.*/mean"],
            ],
            "variance: behind one batch, in powers of 2": ["Multiline", ["running_lag/.*/var"]],
        },
        "Batch and running statistics, channel 0": {
            "norm1, mean": ["Multiline", ["channel_0/norm1/(batch|running)_mean"]],
            "norm1, variance": ["Multiline", ["channel_0/norm1/(batch|running)_var"]],
        },
    }
    charts = dashboard.layout(("acc", "top_5"), TAGS)
    assert charts == expected
    assert list(charts) == list(expected)


def test_precise_statistics_add_charts_of_the_lag_behind_the_population():
    without = dashboard.layout(("acc",), TAGS)
    charts = dashboard.layout(("acc",), TAGS, has_population=True)
    assert list(charts) == list(without)
    section = "Lag of the running statistics"
    lag, lag_of_batch = charts.pop(section), without.pop(section)
    assert charts == without
    assert list(lag.items())[:2] == list(lag_of_batch.items())
    shown = {
        title: [
            tag
            for tag in ("running_lag/a/mean", "population_lag/a/mean", "population_lag/a/var")
            # TensorBoard compares from the beginning of the tag.
            if re.match(pattern, tag)
        ]
        for title, (_, [pattern]) in lag.items()
    }
    assert shown == {
        "mean: behind one batch, in running standard deviations": ["running_lag/a/mean"],
        "variance: behind one batch, in powers of 2": [],
        "mean: behind the population, in running standard deviations": ["population_lag/a/mean"],
        "variance: behind the population, in powers of 2": ["population_lag/a/var"],
    }


def test_each_gradient_norm_is_in_one_chart():
    layers = ("conv", "norm", "blocks.0.conv1", "blocks.0.norm1", "fc")
    norms = [f"channel_0/{name}/gamma" for name in layers if "norm" in name]
    charts = dashboard.layout((), norms)["Gradient norms"]
    shown = {
        title: [name for name in ("all", *layers) if re.match(pattern, f"gradient_norm/{name}")]
        for title, (_, [pattern]) in charts.items()
    }
    assert shown == {
        "all parameters": ["all"],
        "norm layers": ["norm", "blocks.0.norm1"],
        "other layers": ["conv", "blocks.0.conv1", "fc"],
    }


def test_a_network_without_norm_layers_has_no_charts_of_them():
    found = dashboard.layout((), ["gradient_norm/all"])
    assert list(found["Gradient norms"]) == ["all parameters", "other layers"]
    assert list(found["Training"]) == ["loss", "learning rate"]
    titles = ["Training", dashboard.INPUTS, "Saturated activations", "Gradient norms"]
    assert list(found) == titles and found[dashboard.INPUTS] == {}


def test_each_metric_has_its_own_chart():
    charts = dashboard.layout(("acc", "acc_top_5"), ())["Training"]
    patterns = charts["acc"][1]
    assert any(re.match(pattern, "train_acc") for pattern in patterns)
    assert not any(re.match(pattern, "train_acc_top_5") for pattern in patterns)


class Writer:
    """Stands in for a SummaryWriter."""

    def __init__(self):
        self.histograms = []
        self.graphs = []

    def add_histogram(self, tag, values, step, bins):
        self.histograms.append((tag, step, bins))

    def add_graph(self, network, inputs):
        self.graphs.append((network(inputs), inputs))


def test_non_finite_histograms_are_omitted():
    writer = Writer()
    values = {
        "a": torch.ones(3),
        "b": torch.tensor([1.0, torch.nan]),
        "c": torch.tensor([torch.inf]),
    }
    dashboard.add_histograms(writer, values, 7)
    assert writer.histograms == [("a", 7, 30)]


def test_a_float32_copy_of_the_network_is_traced():
    writer, network = Writer(), nn.Linear(3, 2).to(torch.bfloat16).train()
    dashboard.add_graph(writer, network, torch.ones(1, 3, dtype=torch.bfloat16))
    [(outputs, inputs)] = writer.graphs
    assert outputs.dtype == inputs.dtype == torch.float32 and inputs.shape == (1, 3)
    assert network.weight.dtype == torch.bfloat16 and network.training


def test_a_network_with_integer_inputs_is_traced():
    writer = Writer()
    dashboard.add_graph(writer, nn.Embedding(5, 3), torch.tensor([[4]]))
    [(outputs, inputs)] = writer.graphs
    assert outputs.shape == (1, 1, 3) and inputs.dtype == torch.int64


class Fails(nn.Module):
    def __init__(self, error, *, when):
        super().__init__()
        self.error, self.when = error, when

    def forward(self, x):
        raise self.error

    def __deepcopy__(self, memo):
        if self.when == "copied":
            raise self.error
        return self


@pytest.mark.parametrize("when", ["copied", "called"])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("one\ntwo"), "ValueError: one"),
        (NotImplementedError(), "NotImplementedError"),
    ],
    ids=("with a message", "without"),
)
def test_a_network_that_cannot_be_traced_causes_a_warning(error, reason, when):
    with pytest.warns(UserWarning, match=f"cannot be traced: {reason}$"):
        dashboard.add_graph(Writer(), Fails(error, when=when), torch.ones(1, 2))


def test_warnings_of_the_tracer_are_hidden():
    class Warns(nn.Module):
        def forward(self, x):
            warnings.warn("this is constant", stacklevel=1)
            return x

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dashboard.add_graph(Writer(), Warns(), torch.ones(1, 2))


class Untraceable(nn.Module):
    def __init__(self, num_features, num_dims):
        super().__init__()

    def forward(self, x):
        if torch.jit.is_tracing():
            raise RuntimeError("not in a trace")
        return x


def test_a_run_whose_network_cannot_be_traced_succeeds(main, tmp_path):
    expected = "the network's graph, because it cannot be traced: RuntimeError: not in a"
    with pytest.warns(UserWarning, match=expected):
        code, out, _ = main(
            "fit", *BRIEF, "--model.norm", f"{__name__}.Untraceable", "--trainer.max_epochs", 1
        )
    assert code == 0
    assert "test acc" in out and (tmp_path / "runs/lenet/0/result.json").exists()
