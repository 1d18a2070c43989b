"""Output to TensorBoard: charts under Custom Scalars, histograms, and the network's graph."""

import copy
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from bn_lightning.errors import describe_error
from bn_lightning.monitoring.measurements import selection

INPUTS = (
    "Inputs of the activations: 15th, 50th and 85th percentile (Ioffe and Szegedy 2015, figure 1)"
)
# TensorBoard displays 30 bins. Writing its default bins takes ten times as long.
BINS = 30

Layout = dict[str, dict[str, list[Any]]]


def has_tensorboard(trainer: pl.Trainer) -> bool:
    """Return whether one of the loggers is a TensorBoardLogger; the same on all ranks."""
    return any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers)


def writers(trainer: pl.Trainer) -> Iterator[Any]:
    """Yield the SummaryWriter of each TensorBoardLogger; on rank 0 only."""
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                yield logger.experiment


def add_histograms(writer: Any, histograms: Mapping[str, Tensor], step: int) -> None:
    """Write the histograms whose values are all finite; TensorBoard rejects the others."""
    for tag, values in histograms.items():
        if values.isfinite().all():
            writer.add_histogram(tag, values, step, bins=BINS)


def layout(
    metric_names: Sequence[str], tags: Iterable[str], has_population: bool = False
) -> Layout:
    """Return the charts under Custom Scalars, as `SummaryWriter.add_custom_scalars` expects them.

    Args:
        metric_names: metrics of the task, without stage and without the loss.
        tags: tags of the scalars of a monitored step.
        has_population: whether the statistics of the population are estimated too.
    """
    parts = [tag.split("/") for tag in tags]
    activations = dict.fromkeys(part[1] for part in parts if part[0] == "activation_input")
    layers = dict.fromkeys(part[1] for part in parts if part[0] == "channel_0")
    charts: Layout = {
        "Training": {
            "loss": _lines("train_loss$", "train_loss_epoch", "val_loss"),
            **{name: _lines(f"train_{name}$", f"val_{name}$") for name in metric_names},
            "learning rate": _lines("lr-.*"),
        },
        # TensorBoard 2.21 shows bands in reverse order.
        INPUTS: {f"activation {n}": _band(f"activation_input/{n}") for n in reversed(activations)},
        "Saturated activations": {"fraction of the inputs, by activation": _lines("saturated/.*")},
        "Gradient norms": _gradient_charts(layers),
    }
    return charts | _norm_charts(layers, has_population) if layers else charts


def _gradient_charts(norms: Collection[str]) -> dict[str, list[Any]]:
    charts = {"all parameters": _lines("gradient_norm/all$")}
    if norms:
        charts["norm layers"] = _lines(f"gradient_norm/({'|'.join(norms)})$")
    others = "|".join(["all", *norms])
    return charts | {"other layers": _lines(f"gradient_norm/(?!({others})$)")}


def _norm_charts(layers: Iterable[str], has_population: bool) -> Layout:
    lags = {"one batch": "running_lag"}
    if has_population:
        lags["the population"] = "population_lag"
    return {
        "gamma and beta, channel 0": {
            "gamma": _lines("channel_0/.*/gamma"),
            "beta": _lines("channel_0/.*/beta"),
        },
        "Lag of the running statistics": {
            f"{what}: behind {others}, in {unit}": _lines(f"{tag}/.*/{short}")
            for others, tag in lags.items()
            for what, unit, short in (
                ("mean", "running standard deviations", "mean"),
                ("variance", "powers of 2", "var"),
            )
        },
        "Batch and running statistics, channel 0": {
            f"{layer}, {what}": _lines(f"channel_0/{layer}/(batch|running)_{short}")
            for layer in layers
            for what, short in (("mean", "mean"), ("variance", "var"))
        },
    }


def _band(tag: str) -> list[Any]:
    """Return a chart of the median, with a band between the other percentiles."""
    return ["Margin", [f"{tag}/{percentile}" for percentile in ("p50", "p15", "p85")]]


def _lines(*patterns: str) -> list[Any]:
    return ["Multiline", list(patterns)]


def add_graph(writer: Any, network: nn.Module, inputs: Tensor) -> None:
    """Write the network's graph; warn if the network cannot be traced.

    Args:
        inputs: network inputs on any device; only their shape and dtype are used.
    """
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        # The tracer warns about each value that becomes a constant.
        warnings.simplefilter("ignore")
        try:
            # Tracing calls the network, so it gets a copy.
            traced = copy.deepcopy(network).cpu().float().eval()
            dtype = torch.float32 if inputs.is_floating_point() else inputs.dtype
            writer.add_graph(traced, torch.zeros(inputs.shape, dtype=dtype))
            return
        # A layer may raise any exception during tracing, or on a CPU.
        except Exception as error:
            reason = describe_error(error)
    warnings.warn(
        f"TensorBoard does not show the network's graph, because it cannot be traced: {reason}",
        stacklevel=2,
    )


def selection_table(layers: Mapping[str, Sequence[str]], max_layers: int) -> str:
    """Return a table, in Markdown, of the layers that are monitored.

    Args:
        layers: names of all layers of each kind, in order.
        max_layers: number of layers of each kind that are monitored at most.
    """
    rows = []
    for kind, names in layers.items():
        chosen = selection(names, max_layers)
        rows.append(f"| {kind} | {len(chosen)} of {len(names)} | {', '.join(chosen)} |")
    most = max(map(len, layers.values()))
    return "\n".join(["| | monitored | names |", "|---|---|---|", *rows, "", how_to_monitor(most)])


def how_to_monitor(max_layers: int) -> str:
    """Return how to monitor a number of layers."""
    return (
        "To monitor all of them, add --trainer.callbacks+=bn_lightning.NormMonitor "
        f"--trainer.callbacks.max_layers {max_layers} (in Python: "
        f"NormMonitor(max_layers={max_layers}))."
    )
