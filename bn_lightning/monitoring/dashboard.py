"""What TensorBoard is given: charts under Custom Scalars, histograms, and the network's graph."""

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from bn_lightning.errors import describe_error

INPUTS = (
    "Inputs of the activations: 15th, 50th and 85th percentile (Ioffe and Szegedy 2015, figure 1)"
)
# TensorBoard shows 30 bins. Its own choice of bins takes ten times as long to write.
BINS = 30

Layout = dict[str, dict[str, list[Any]]]


def has_tensorboard(trainer: pl.Trainer) -> bool:
    """Return whether one of the loggers is TensorBoard's, on every rank."""
    return any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers)


def writers(trainer: pl.Trainer) -> Iterator[Any]:
    """Yield TensorBoard's own writers; only rank 0 has any."""
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                yield logger.experiment


def add_histograms(writer: Any, histograms: Mapping[str, Tensor], step: int) -> None:
    """Write the histograms whose values are finite.

    A diverging run is ended elsewhere, because of its loss.
    """
    for tag, values in histograms.items():
        if values.isfinite().all():
            writer.add_histogram(tag, values, step, bins=BINS)


def layout(metric_names: Sequence[str], tags: Iterable[str]) -> Layout:
    """Return the charts under Custom Scalars: by category and title, a kind and patterns of tags.

    Args:
        metric_names: of the task, without the stage and without the loss.
        tags: of the scalars that were measured in a monitored step.
    """
    parts = [tag.split("/") for tag in tags]
    activations = dict.fromkeys(part[1] for part in parts if part[0] == "activation_input")
    layers = dict.fromkeys(part[1] for part in parts if part[0] == "channel_0")
    found: Layout = {
        "Training": {
            "loss": _lines("train_loss$", "train_loss_epoch", "val_loss"),
            **{name: _lines(f"train_{name}$", f"val_{name}$") for name in metric_names},
            "learning rate": _lines("lr-.*"),
        },
        INPUTS: {
            # A band has a value, a lower and an upper edge.
            f"activation {n}": [
                "Margin",
                [f"activation_input/{n}/{p}" for p in ("p50", "p15", "p85")],
            ]
            # TensorBoard 2.21 shows bands from the last to the first.
            for n in reversed(activations)
        },
        "Saturated activations": {"share of each layer": _lines("saturated/.*")},
        "Gradient norms": {"by layer": _lines("gradient_norm/.*")},
    }
    return found | _norm_charts(layers) if layers else found


def _norm_charts(layers: Iterable[str]) -> Layout:
    return {
        "Statistics of the batch and running ones, channel 0": {
            f"{layer}, {what}": _lines(f"channel_0/{layer}/(batch|running)_{short}")
            for layer in layers
            for what, short in (("mean", "mean"), ("variance", "var"))
        },
        "How far the running statistics lag": {
            "mean": _lines("running_lag/.*/mean"),
            "variance": _lines("running_lag/.*/var"),
        },
        "gamma and beta, channel 0": {
            "gamma": _lines("channel_0/.*/gamma"),
            "beta": _lines("channel_0/.*/beta"),
        },
    }


def _lines(*patterns: str) -> list[Any]:
    return ["Multiline", list(patterns)]


def add_graph(writer: Any, network: nn.Module, inputs: Tensor) -> None:
    """Write the network's graph, or warn if the network cannot be traced.

    Args:
        inputs: of the network, on any device. Only their shape and kind of number matter.
    """
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        # The tracer warns of everything that is constant in this network.
        warnings.simplefilter("ignore")
        try:
            # A copy, since the trace calls the network.
            traced = copy.deepcopy(network).cpu().float().eval()
            dtype = torch.float32 if inputs.is_floating_point() else inputs.dtype
            writer.add_graph(traced, torch.zeros(inputs.shape, dtype=dtype))
            return
        # The code of a layer may raise anything where it is traced or finds no GPU.
        except Exception as error:
            reason = describe_error(error)
    warnings.warn(
        f"TensorBoard gets no graph of the network, which cannot be traced: {reason}", stacklevel=2
    )
