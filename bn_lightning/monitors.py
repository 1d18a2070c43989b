"""Callbacks that look on and change nothing: what the norms do while a network is trained, and what it gets wrong."""

import copy
import math
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from bn_lightning import drawing, norms

PERCENTILES = (15, 50, 85)  # of figure 1 in Ioffe and Szegedy 2015
SAMPLE = 4_096  # values of a layer that percentiles and saturation are taken of
LOOKS_PER_HISTOGRAM = 2  # one takes as long as five scalars
SATURATED = 0.05  # of the steepest slope of an activation function
EPS = 1e-5
INPUTS = "Inputs of the activations: 15th, 50th and 85th percentile (Ioffe and Szegedy 2015, figure 1)"
# Not elementwise, or, in training, with a random slope.
NOT_MONITORED = (nn.Softmax, nn.Softmin, nn.Softmax2d, nn.LogSoftmax, nn.GLU, nn.PReLU, nn.RReLU, nn.MultiheadAttention)


class NormMonitor(pl.Callback):
    """Logs what the norms of a network do: `Trainer(callbacks=[NormMonitor()])`.

    A norm is found by what it keeps, not by its class (`norms.layers`), an activation by being a module of
    `torch.nn.modules.activation`; activations are counted in the order in which they run. Hooks are in place in the
    steps that are looked at, and in no other. With several processes it is the first one's slice of the batch.

    Tags, with the figures of the step before it has changed anything:

    * `activation_input/1/p15`, `p50`, `p85`: percentiles of what an activation is given, figure 1 (b, c) of Ioffe and
      Szegedy 2015, https://arxiv.org/abs/1502.03167;
    * `saturated/1`: the share of those where the activation is flat: its slope a twentieth of its steepest, or less;
    * `channel_0/norm1/batch_mean`, `running_mean`, `batch_var`, `running_var`, `gamma`, `beta`: one channel whole; all
      channels are under the same names in the histograms;
    * `running_lag/norm1/mean`: of the batch mean less the running one, in running deviations, the root mean square over
      the channels; `running_lag/norm1/var`: the same of log2(batch variance / running variance);
    * `gradient_norm/conv1`, and of all parameters `gradient_norm/all`; `steps_per_second`.

    With TensorBoard they are laid out as charts under Custom Scalars.

    Args:
        every_n_steps: look at each optimizer step of that number.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        self.every_n_steps = every_n_steps
        self._looking = ExitStack()  # hooks, while they are in place
        self._looked_at = -1  # the step
        self._activations = 0  # that have run in this step
        self._wants_gradients = self._wants_histograms = False
        self._scalars: dict[str, float] = {}
        self._histograms: dict[str, Tensor] = {}
        self._since: tuple[int, float] | None = None  # step and time
        self._steepest: dict[nn.Module, float] = {}
        self._is_laid_out = False

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self._since is None:
            self._since = step, time.perf_counter()
        if step % self.every_n_steps or step == self._looked_at or not trainer.is_global_zero or not trainer.loggers:
            return
        self._looked_at, self._activations, self._wants_gradients = step, 0, True
        self._wants_histograms = step % (self.every_n_steps * LOOKS_PER_HISTOGRAM) == 0
        before, then = self._since
        self._since = step, time.perf_counter()
        if step > before:
            self._scalars["steps_per_second"] = (step - before) / (self._since[1] - then)
        self._looking.enter_context(torch.compiler.set_stance("force_eager"))  # hooks would be compiled along
        watched = norms.layers(pl_module)
        for name, module in pl_module.named_modules():
            if name in watched:
                self._looking.enter_context(module.register_forward_pre_hook(self._norm_hook(_short(name))))
            elif _is_activation(module):
                self._looking.enter_context(module.register_forward_pre_hook(self._look_at_activation))

    def _norm_hook(self, name: str) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach()
            x = x.float() if x.dtype.itemsize < 4 else x
            reduced = [d for d in range(x.dim()) if d != 1]
            mean = x.mean(reduced, keepdim=True)
            var = (x - mean).square_().mean(reduced)  # in a tenth of the time of torch.var_mean
            mean = mean.flatten()
            kept = dict([*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)])
            figures = {"batch_mean": mean, "batch_var": var} | norms.by_channel(kept)
            if {"running_mean", "running_var"} <= figures.keys():
                running_mean, running_var = figures["running_mean"], figures["running_var"] + EPS
                off = {
                    "mean": (mean - running_mean) / running_var.sqrt(),
                    "var": ((var + EPS) / running_var).log2(),
                }
                for what, by_channel in off.items():
                    self._scalars[f"running_lag/{name}/{what}"] = float(by_channel.square().mean().sqrt())
            for what, by_channel in figures.items():
                self._scalars[f"channel_0/{name}/{what}"] = float(by_channel[0])
                if self._wants_histograms:
                    self._histograms[f"{what}/{name}"] = by_channel.clone()  # the running ones are about to move

        return look

    def _look_at_activation(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._activations += 1
        x = args[0].detach()
        apart = max(1, x.numel() // SAMPLE) | 1  # odd, so that they fall on all places in a picture
        values = x.take(torch.arange(0, x.numel(), apart, device=x.device)).float()
        levels = np.percentile(values.cpu().numpy(), PERCENTILES)
        for percentile, level in zip(PERCENTILES, levels, strict=True):
            self._scalars[f"activation_input/{self._activations}/p{percentile}"] = float(level)
        if module not in self._steepest:
            self._steepest[module] = float(_slope(module, torch.linspace(-8, 8, 1_601, device=values.device)).max())
        is_flat = _slope(module, values) <= SATURATED * self._steepest[module]
        self._scalars[f"saturated/{self._activations}"] = float(is_flat.float().mean())

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if not self._wants_gradients:  # asked at each step: the trainer takes longer to say which one it is
            return
        self._wants_gradients = False
        squares = 0.0
        for name, module in pl_module.named_modules():
            gradients = [p.grad for p in module.parameters(recurse=False) if p.grad is not None]
            if gradients:
                norm = float(get_total_norm(gradients))
                squares += norm**2
                self._scalars[f"gradient_norm/{_short(name)}"] = norm
        self._scalars["gradient_norm/all"] = math.sqrt(squares)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._looking.close()
        if not self._scalars:
            return
        for logger in trainer.loggers:
            logger.log_metrics(self._scalars, self._looked_at)
        for writer in _writers(trainer):
            for tag, values in self._histograms.items():
                if values.isfinite().all():  # a run that has lost its way is stopped elsewhere, with more to say
                    # As many bins as TensorBoard shows; its own choice of them takes ten times as long.
                    writer.add_histogram(tag, values, self._looked_at, bins=30)
            if not self._is_laid_out:
                writer.add_custom_scalars(_layout(self._scalars))
        self._is_laid_out = True
        self._scalars, self._histograms = {}, {}

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._looking.close()


class ClosingPictures(pl.Callback):
    """At the end of a test: the confusion matrix, the most confident mistakes, the first layer's filters, the graph.

    For TensorBoard, under Images and Graphs. It wants of the module what `Classifier` has: a `test_step` that returns
    the logits, and after the test the counts `confusion`.

    Args:
        mistakes: how many of the images that were taken for another class with the highest probability.
    """

    def __init__(self, mistakes: int = 25) -> None:
        self.mistakes = mistakes

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._worst: list[Tensor] = []  # probability, guess, truth, image

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not _has_tensorboard(trainer):
            return
        images, truth = batch
        probability, guess = outputs.float().softmax(1).max(1)
        probability = probability.where(guess != truth, -1.0)
        found = [probability, guess, truth, images]
        if self._worst:
            found = [torch.cat(pair) for pair in zip(self._worst, found, strict=True)]
        keep = found[0].topk(min(self.mistakes, len(found[0]))).indices
        self._worst = [values[keep] for values in found]

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not _has_tensorboard(trainer):
            return
        worst = [values.cpu() for values in self._worst]
        if trainer.world_size > 1:
            of_all: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(of_all, worst)
            worst = [torch.cat(values) for values in zip(*of_all, strict=True)]
        counts: Tensor = pl_module.confusion  # type: ignore[assignment]
        names = [str(name) for name in getattr(trainer.datamodule, "classes", range(len(counts)))]  # type: ignore[attr-defined]
        pictures = {
            "confusion_matrix": drawing.confusion(counts, names),
            "most_confident_mistakes": self._draw_mistakes(worst, names),
        }
        convolution = next((p for p in pl_module.parameters() if p.dim() == 4), None)
        if convolution is not None:
            pictures["first_layer_filters"] = drawing.filters(convolution)
        for writer in _writers(trainer):
            for tag, picture in pictures.items():
                if picture is not None:
                    writer.add_image(tag, np.asarray(picture), trainer.global_step, dataformats="HWC")
            _add_graph(writer, pl_module, worst[3][:1])

    def _draw_mistakes(self, worst: list[Tensor], names: list[str]) -> Image.Image | None:
        probability, guess, truth, images = worst
        order = [i for i in probability.argsort(descending=True).tolist() if probability[i] >= 0][: self.mistakes]
        if not order:
            return None
        low, high = images.min(), images.max()  # standardized or not
        pixels = ((images - low) / (high - low) * 255).round().to(torch.uint8)
        captions = [f"{names[guess[i]]} {probability[i]:.1%}\nis {names[truth[i]]}" for i in order]
        return drawing.grid(pixels[order, 0], captions)


def _has_tensorboard(trainer: pl.Trainer) -> bool:
    return any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers)


def _writers(trainer: pl.Trainer) -> Iterator[Any]:
    """TensorBoard's own writers, in the process that has them."""
    if trainer.is_global_zero:
        yield from (logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger))


def _short(name: str) -> str:
    return name.removeprefix("network.")


def _is_activation(module: nn.Module) -> bool:
    return type(module).__module__ == nn.ReLU.__module__ and not isinstance(module, NOT_MONITORED)


def _slope(activation: nn.Module, at: Tensor) -> Tensor:
    """The absolute slope of an activation function, elementwise."""
    with torch.enable_grad():
        x = at.detach().requires_grad_()
        y = activation.forward(x.clone())  # not by a call, which would come back to the hooks; some work in place
        return torch.autograd.grad(y.sum(), x)[0].abs()


def _layout(tags: Iterable[str]) -> dict[str, dict[str, list[Any]]]:
    """What TensorBoard shows under Custom Scalars: by category and chart, its kind and patterns of tags."""
    parts = [tag.split("/") for tag in tags]
    activations = dict.fromkeys(part[1] for part in parts if part[0] == "activation_input")
    layers = dict.fromkeys(part[1] for part in parts if part[0] == "channel_0")

    def lines(*patterns: str) -> list[Any]:
        return ["Multiline", list(patterns)]

    layout: dict[str, dict[str, list[Any]]] = {
        "Training": {
            "loss": lines("train_loss$", "train_loss_epoch", "val_loss"),
            "accuracy": lines("train_acc", "val_acc"),
            "learning rate": lines("lr-.*"),
        },
        INPUTS: {  # a band: the value in it, its lower and its upper edge
            f"activation {n}": ["Margin", [f"activation_input/{n}/{p}" for p in ("p50", "p15", "p85")]]
            for n in reversed(activations)  # TensorBoard 2.21 shows bands from the last to the first
        },
        "Saturated activations": {"share of each layer": lines("saturated/.*")},
        "Gradient norms": {"by layer": lines("gradient_norm/.*")},
    }
    if layers:
        layout["Statistics of the batch and running ones, channel 0"] = {
            f"{layer}, {what}": lines(f"channel_0/{layer}/(batch|running)_{short}")
            for layer in layers
            for what, short in (("mean", "mean"), ("variance", "var"))
        }
        layout["How far the running statistics lag"] = {
            "mean": lines("running_lag/.*/mean"),
            "variance": lines("running_lag/.*/var"),
        }
        layout["gamma and beta, channel 0"] = {
            "gamma": lines("channel_0/.*/gamma"),
            "beta": lines("channel_0/.*/beta"),
        }
    return layout


def _add_graph(writer: Any, pl_module: pl.LightningModule, images: Tensor) -> None:
    """The network's graph; traced with a copy, since a trace calls the network."""
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore")  # of the tracer, on what is constant in this network
        network = copy.deepcopy(getattr(pl_module, "network", pl_module)).cpu().float().eval()
        writer.add_graph(network, torch.zeros(images.shape))
