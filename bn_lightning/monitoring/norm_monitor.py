"""Callbacks that look on and change nothing: what the norms do while a network is trained, and what it gets wrong."""

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
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

from bn_lightning.errors import UserError
from bn_lightning.monitoring import drawing
from bn_lightning.norms import recognition

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

    A norm is found by what it keeps, not by its class (`recognition.layers`), an activation by being a module of
    `torch.nn.modules.activation`; activations are counted in the order in which they run. Hooks are in place in the
    steps that are looked at, and in no other. With several processes it is the first one's slice of the batch.

    Tags, with the figures of a step's first forward pass, before it has changed anything:

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

    Raises:
        UserError: a number below 1.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        if every_n_steps < 1:
            raise UserError(f"every_n_steps is {every_n_steps}; it must be at least 1: NormMonitor(every_n_steps=100)")
        self.every_n_steps = every_n_steps
        self._looking = ExitStack()  # hooks, while they are in place
        self._begin()

    def _begin(self) -> None:
        self._looked_at = -1  # the step
        self._since: tuple[int, float] | None = None  # step and time
        self._wants_gradients = self._wants_histograms = False
        self._norms: set[str] = set()  # that have run in this step
        self._inputs: list[tuple[nn.Module, Tensor]] = []  # of the activations, in the order in which they run
        self._squares: dict[Optimizer, float] = {}  # of the gradients that a step of it took
        self._scalars: dict[str, float] = {}
        self._histograms: dict[str, Tensor] = {}
        self._steepest: dict[nn.Module, float] = {}
        self._is_laid_out = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since = None

    on_validation_start = on_train_epoch_start

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self._since is None:
            self._since = step, time.perf_counter()
        if step % self.every_n_steps or step == self._looked_at or not trainer.is_global_zero or not trainer.loggers:
            return
        self._looked_at, self._wants_gradients = step, True
        self._norms = set()
        self._wants_histograms = step % (self.every_n_steps * LOOKS_PER_HISTOGRAM) == 0
        before, then = self._since
        self._since = step, time.perf_counter()
        if step > before:
            self._scalars["steps_per_second"] = (step - before) / (self._since[1] - then)
        self._looking.enter_context(torch.compiler.set_stance("force_eager"))  # hooks would be compiled along
        watched = recognition.layers(pl_module)
        for name, module in pl_module.named_modules():
            hook: Callable[..., None]
            if name in watched:
                hook = partial(self._look_at_norm, _short(name))
            elif _is_activation(module):
                hook = self._look_at_activation
            else:
                continue
            self._looking.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _look_at_norm(self, name: str, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name in self._norms:
            return  # called again in this step: its running statistics have moved
        self._norms.add(name)
        figures = recognition.by_channel(
            dict([*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)])
        )
        x = _first_tensor(args, kwargs)
        if x is not None and x.dim() > 1 and all(len(values) == x.size(1) for values in figures.values()):
            x = x.float() if x.dtype.itemsize < 4 else x
            reduced = [d for d in range(x.dim()) if d != 1]
            mean = x.mean(reduced, keepdim=True)
            var = (x - mean).square_().mean(reduced)  # in a tenth of the time of torch.var_mean
            mean = mean.flatten()
            figures |= {"batch_mean": mean, "batch_var": var}
            if {"running_mean", "running_var"} <= figures.keys():
                running_mean, running_var = figures["running_mean"], figures["running_var"] + EPS
                self._scalars[f"running_lag/{name}/mean"] = _rms((mean - running_mean) / running_var.sqrt())
                self._scalars[f"running_lag/{name}/var"] = _rms(((var + EPS) / running_var).log2())
        for what, by_channel in figures.items():
            self._scalars[f"channel_0/{name}/{what}"] = float(by_channel[0])
            if self._wants_histograms:
                self._histograms[f"{what}/{name}"] = by_channel.clone()  # the running ones are about to move

    def _look_at_activation(self, activation: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = _first_tensor(args, kwargs)
        if x is not None:
            apart = max(1, x.numel() // SAMPLE) | 1  # odd, so that they fall on all places in a picture
            values = x.take(torch.arange(0, x.numel(), apart, device=x.device)).float()
            self._inputs.append((activation, values))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """What the first forward pass has shown; a checkpointed one is repeated from here on."""
        self._looking.close()
        for number, (activation, values) in enumerate(self._inputs, 1):
            levels = np.percentile(values.cpu().numpy(), PERCENTILES)
            for percentile, level in zip(PERCENTILES, levels, strict=True):
                self._scalars[f"activation_input/{number}/p{percentile}"] = float(level)
            if activation not in self._steepest:
                around_0 = torch.linspace(-8, 8, 1_601, device=values.device)
                self._steepest[activation] = float(_slope(activation, around_0).max())
            is_flat = _slope(activation, values) <= SATURATED * self._steepest[activation]
            self._scalars[f"saturated/{number}"] = float(is_flat.float().mean())
        self._inputs = []

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if not self._wants_gradients or optimizer in self._squares:
            return
        own = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        self._squares[optimizer] = 0.0
        for name, module in pl_module.named_modules():
            of_layer = [p for p in module.parameters(recurse=False) if p in own and p.grad is not None]
            if of_layer:
                own -= set(of_layer)  # what is used in two layers counts in one
                norm = float(get_total_norm([p.grad for p in of_layer if p.grad is not None]))
                self._squares[optimizer] += norm**2
                self._scalars[f"gradient_norm/{_short(name)}"] = norm
        self._scalars["gradient_norm/all"] = math.sqrt(sum(self._squares.values()))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._wants_gradients:
            return
        self._looking.close()
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
        self._wants_gradients = not self._squares  # those of a step that takes several batches are still to come
        self._scalars, self._histograms, self._squares = {}, {}, {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._looking.close()  # a callback can leave out the rest of an epoch

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._looking.close()


class ClosingPictures(pl.Callback):
    """At the end of a test: the confusion matrix, the most confident mistakes, the first layer's filters, the graph.

    For TensorBoard, under Images and Graphs. It goes by the logits that `test_step` returns, and shows nothing where it
    returns none; the matrix is that of the module's counts `confusion` after the test, as `Classifier` has them.

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
        if not _has_tensorboard(trainer) or not isinstance(outputs, Tensor):
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
            worst = [torch.cat(values) for values in zip(*filter(None, of_all), strict=True)]
        if not trainer.is_global_zero or not worst:
            return
        counts = getattr(pl_module, "confusion", None)
        classes = getattr(trainer.datamodule, "classes", range(1_000))  # type: ignore[attr-defined]
        names = [str(name) for name in classes]
        pictures = {
            "confusion_matrix": drawing.confusion(counts, names[: len(counts)]) if counts is not None else None,
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
        return drawing.grid(pixels[order].movedim(1, -1).squeeze(-1), captions)


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


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """What a module is given, without its gradient; None for what has no values to look at."""
    for given in (*args, *kwargs.values()):
        if isinstance(given, Tensor) and given.is_floating_point() and given.numel():
            return given.detach()
    return None


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


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
        try:
            writer.add_graph(network, torch.zeros(images.shape))
            return
        except Exception as error:  # whatever the code of a norm raises where it is traced, or finds no GPU
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    warnings.warn(f"TensorBoard gets no graph of the network, which cannot be traced: {reason}", stacklevel=2)
