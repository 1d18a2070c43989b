"""Holds any normalization layer to what a norm must do, and to torch's BatchNorm: the command `check`."""

import copy
import io
import itertools
import json
import logging
import pickle
import socket
import statistics
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jsonargparse import ArgumentParser
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from bn_lightning import __version__
from bn_lightning.errors import UserError
from bn_lightning.norms import registry
from bn_lightning.norms.sync import LayerSync

FEATURES = 6
SHAPES = {2: (32, FEATURES), 4: (8, FEATURES, 5, 4)}
AXES = {2: ("images", "channels"), 4: ("images", "channels", "height", "width")}
SHARES = (6, 2)  # images on each of two processes

Make = Callable[..., nn.Module]
Answer = tuple[float, str]  # the largest difference, and what it comes from where that is known


@dataclass
class Finding:
    """One line of the table.

    `property`: what any norm must do, `pass` or `FAIL`. `identity`: whether the layer is torch's BatchNorm, `same` or
    `DIFFERS`, which for another kind of norm is as it should be. `measured`: a ratio to torch's. `n/a` with the reason.
    """

    section: str
    question: str
    verdict: str
    difference: float | None
    note: str


class NotApplicable(Exception):
    """A question that does not arise for this layer, or cannot be answered on this machine."""


@dataclass
class Check:
    section: str
    question: str
    tolerance: float
    advice: str
    answer: Callable[[Make], Answer]

    def __call__(self, make: Make) -> Finding:
        try:
            difference, note = self.answer(make)
        except NotApplicable as reason:
            return Finding(self.section, self.question, "n/a", None, str(reason))
        except Exception as error:  # whatever a layer raises is a finding about it
            said = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            return Finding(self.section, self.question, _BAD[self.section], None, said)
        good = difference <= self.tolerance  # and so not for NaN
        verdict = (_GOOD if good else _BAD)[self.section]
        return Finding(self.section, self.question, verdict, difference, note or ("" if good else self.advice))


_GOOD = {"property": "pass", "identity": "same", "measured": "measured"}
_BAD = {"property": "FAIL", "identity": "DIFFERS", "measured": "measured"}
CHECKS: list[Check] = []


def asks(section: str, question: str, tolerance: float, advice: str) -> Callable[[Callable[[Make], Answer]], None]:
    def register(answer: Callable[[Make], Answer]) -> None:
        CHECKS.append(Check(section, question, tolerance, advice, answer))

    return register


# What the questions are asked with.


def batch(num_dims: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Values with another mean and deviation in each channel, of the shape in `SHAPES`."""
    generator = torch.Generator().manual_seed(seed)
    channel = torch.arange(1, FEATURES + 1, dtype=torch.float64).view(-1, *[1] * (num_dims - 2))
    return (torch.randn(SHAPES[num_dims], generator=generator, dtype=torch.float64) * channel + channel).to(dtype)


def difference(one: Any, other: Any) -> float:
    """The largest difference between two tensors, or two sequences of them, in units of the largest value above 1."""
    if not isinstance(one, Tensor):
        return max((difference(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
    if one.shape != other.shape:
        raise ValueError(f"shapes {tuple(one.shape)} and {tuple(other.shape)}")
    if not one.numel():
        return 0.0
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).abs().max() / max(1.0, other.abs().max().item()))


def each(make: Make) -> Iterator[tuple[int, nn.Module, Tensor]]:
    """For linear layers and for convolutions: number of dimensions, a fresh float64 layer in training, a batch."""
    for num_dims in SHAPES:
        yield num_dims, make(num_dims).double().train(), batch(num_dims)


def gradient_of(shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The gradient by an output of that shape with which all steps are taken."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def all_but_channels(num_dims: int) -> tuple[int, ...]:
    return tuple(d for d in range(num_dims) if d != 1)


def shares(x: Tensor) -> tuple[Tensor, ...]:
    return x[: SHARES[0]], x[SHARES[0] :]


def step(layer: nn.Module, x: Tensor, gradient: Tensor | None = None) -> list[Tensor]:
    """Output, gradient by the input, gradients by the parameters, of the sum of the output weighted at random."""
    layer.zero_grad()
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(leaf)
    y.backward((gradient_of(y.shape) if gradient is None else gradient).to(y.dtype))
    assert leaf.grad is not None
    return [y.detach(), leaf.grad, *(p.grad.flatten() for p in layer.parameters() if p.grad is not None)]


def settled(layer: nn.Module, x: Tensor, steps: int = 1_000) -> nn.Module:
    """The layer after so many times the same batch."""
    for _ in range(steps):
        layer(x)
    return layer


def in_eval(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(layer).eval()(x)  # type: ignore[no-any-return]


def eps_of(layer: nn.Module) -> float:
    return float(getattr(layer, "eps", 1e-5))


def torchs(layer: nn.Module, num_dims: int) -> nn.Module:
    """torch's layer, with the eps and the dtype of this one."""
    twin = registry.builtin(FEATURES, num_dims, eps_of(layer))
    return twin.to(next((p.dtype for p in layer.parameters()), torch.float64))


def normalized(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) / (var + eps).sqrt()


def running(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """The layer's running mean and variance, by the names of its buffers."""
    found = [[b for name, b in layer.named_buffers() if word in name] for word in ("mean", "var")]
    if not all(found):
        raise NotApplicable("it has no buffers whose names say mean and var")
    return found[0][0].flatten(), found[1][0].flatten()


# Properties: what any norm must do.


@asks("property", "shape and dtype are kept, in training and eval", 0, "return a tensor like the input")
def _(make: Make) -> Answer:
    for num_dims, training, dtype in itertools.product(SHAPES, (True, False), (torch.float32, torch.float64)):
        x = batch(num_dims, dtype=dtype)
        y = make(num_dims).to(dtype).train(training)(x)
        if (y.shape, y.dtype) != (x.shape, x.dtype):
            return float("inf"), f"{tuple(x.shape)} of {x.dtype} became {tuple(y.shape)} of {y.dtype}"
    return 0, ""


@asks("property", "a fresh layer gives zero mean and unit variance", 2e-2, "normalize before gamma and beta")
def _(make: Make) -> Answer:
    outputs = [layer(x).detach() for _, layer, x in each(make)]
    off_centre = max(abs(y.mean().item()) for y in outputs)
    if off_centre > 2e-2 and all(abs(y.square().mean().item() - 1) < 2e-2 for y in outputs):
        raise NotApplicable(f"its mean square is 1 and its mean {off_centre:.2f}: it does not centre, as an RMS norm")
    return max(off_centre, *(abs(y.var(correction=0).item() - 1) for y in outputs)), ""


@asks("property", "the scale of the input does not matter", 1e-3, "divide by a statistic of the input")
def _(make: Make) -> Answer:
    return max(difference(copy.deepcopy(layer)(4 * x), layer(x)) for _, layer, x in each(make)), ""


@asks("property", "a constant input gives finite results and gradients", 0, "add eps under the root")
def _(make: Make) -> Answer:
    results = [t for _, layer, x in each(make) for t in step(layer, torch.ones_like(x))]
    return (0.0 if all(t.isfinite().all() for t in results) else float("inf")), ""


@asks(
    "property",
    "training is told by module.training",
    1e-9,
    "the mode follows torch.is_grad_enabled(): use self.training, or an evaluation with gradients, or a pass in "
    "training without, does the wrong thing",
)
def _(make: Make) -> Answer:
    worst = 0.0
    for _, layer, x in each(make):
        layer(x + 1)
        for training in (True, False):
            layer.train(training)
            with_gradients = copy.deepcopy(layer)(x)
            with torch.no_grad():
                worst = max(worst, difference(copy.deepcopy(layer)(x), with_gradients))
    return worst, ""


@asks("property", "eval is deterministic and changes no state", 0, "in eval mode read the state and leave it alone")
def _(make: Make) -> Answer:
    worst = 0.0
    for _, layer, x in each(make):
        layer(x + 1)
        layer.eval()
        before = copy.deepcopy(layer.state_dict())
        with torch.no_grad():
            worst = max(worst, difference(layer(x), layer(x)))
        worst = max(worst, difference(list(layer.state_dict().values()), list(before.values())))
    return worst, ""


@asks(
    "property",
    "eval takes each image by itself",
    1e-9,
    "eval uses the statistics of its batch: normalize by the running ones where self.training is False",
)
def _(make: Make) -> Answer:
    worst = 0.0
    for _, layer, x in each(make):
        layer(x + 1)
        worst = max(worst, difference(in_eval(layer, x[:1]), in_eval(layer, x)[:1]))
    return worst, ""


@asks(
    "property",
    "eval agrees with training on a batch seen often",
    5e-2,
    "the running statistics do not arrive at those of the batch",
)
def _(make: Make) -> Answer:
    return max(difference(in_eval(settled(layer, x), x), layer(x)) for _, layer, x in each(make)), ""


@asks(
    "property",
    "one odd batch does not overturn the running statistics",
    0.5,
    "the newest batch outweighs all before it: is the momentum the wrong way round?",
)
def _(make: Make) -> Answer:
    moves = []
    for _, layer, x in each(make):
        settled(layer, x)
        before, odd = in_eval(layer, x), 3 * x + 50
        layer(odd)
        after, at_last = in_eval(layer, x), in_eval(settled(layer, odd), x)
        whole = (at_last - before).abs().max().item()
        # Statistics enter the output by a root and a quotient, so this share is not the momentum; it grows with it.
        moves.append((after - before).abs().max().item() / whole if whole > 1e-6 else 0.0)
    return max(moves), ""


@asks(
    "property",
    "its state survives a checkpoint",
    0,
    "what eval goes by is not in the state dict: register the statistics as buffers",
)
def _(make: Make) -> Answer:
    worst = 0.0
    for num_dims, layer, x in each(make):
        step(layer, x)
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        restored = make(num_dims).double()
        restored.load_state_dict(torch.load(file, weights_only=True))
        worst = max(worst, difference(in_eval(restored, x), in_eval(layer, x)))
    return worst, ""


@asks("property", "it can be copied and pickled", 0, "keep nothing in it that copy.deepcopy or pickle refuse")
def _(make: Make) -> Answer:
    worst = 0.0
    for _, layer, x in each(make):
        layer(x)
        layer.zero_grad()
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            worst = max(worst, difference(in_eval(other, x), in_eval(layer, x)))
    return worst, ""


@asks("property", "no step hangs on the step before", 0, "detach the batch's statistics before they enter the buffers")
def _(make: Make) -> Answer:
    for _, layer, x in each(make):
        step(layer, x)
        step(layer, x)
        if any(b.requires_grad for b in layer.buffers()):
            return float("inf"), ""
    return 0, ""


@asks("property", "its gradient is that of what it computes", 1e-5, "compare it with torch.autograd.gradcheck")
def _(make: Make) -> Answer:
    worst, note = 0.0, ""
    for _, layer, x in each(make):
        start = copy.deepcopy(layer)
        y, dx, *rest = step(layer, x)
        gradient = gradient_of(y.shape)
        parameters = [p for p in start.parameters() if p.requires_grad]

        def value(
            h: float,
            directions: list[Tensor],
            start: nn.Module = start,
            x: Tensor = x,
            gradient: Tensor = gradient,
        ) -> float:
            moved = copy.deepcopy(start)
            with torch.no_grad():
                for p, d in zip(moved.parameters(), directions[1:], strict=True):
                    p.add_(d.view_as(p), alpha=h)
            return float((moved(x + h * directions[0]) * gradient).sum().detach())

        for seed in range(3):
            torch_random = torch.Generator().manual_seed(seed)
            directions = [torch.randn(t.shape, generator=torch_random, dtype=torch.float64) for t in (x, *parameters)]
            slope = (value(1e-5, directions) - value(-1e-5, directions)) / 2e-5
            own = sum((g.flatten() @ d.flatten()).item() for g, d in zip((dx, *rest), directions, strict=True))
            worst = max(worst, abs(slope - own) / max(1.0, abs(slope)))
        if worst > 1e-5 and not note:
            note = _what_the_gradient_misses(x, gradient, dx, eps_of(layer))
    return worst, note


def _what_the_gradient_misses(x: Tensor, gradient: Tensor, dx: Tensor, eps: float) -> str:
    """By comparison with batch normalization whose mean, variance or both are held for constants."""
    axes = all_but_channels(x.dim())
    for held in (("variance",), ("mean",), ("mean", "variance")):
        leaf = x.clone().requires_grad_()
        mean = leaf.mean(axes, keepdim=True)
        mean = mean.detach() if "mean" in held else mean
        var = (leaf - mean).square().mean(axes, keepdim=True)
        var = var.detach() if "variance" in held else var
        torch.autograd.backward((leaf - mean) / (var + eps).sqrt(), gradient)
        assert leaf.grad is not None
        if difference(dx, leaf.grad) < 1e-6:
            return f"no gradient flows through the {' and the '.join(held)}"
    return ""


@asks("property", "channels-last input gives the same result", 1e-9, "address dimensions by number, not by memory")
def _(make: Make) -> Answer:
    x = batch(4)
    layer = make(4).double().train()
    return difference(
        step(copy.deepcopy(layer), x.to(memory_format=torch.channels_last)), step(copy.deepcopy(layer), x)
    ), ""


@asks("property", "bfloat16 input gives the result to bfloat16's precision", 4e-2, "compute statistics in float32")
def _(make: Make) -> Answer:
    worst = 0.0
    for num_dims in SHAPES:
        x = batch(num_dims, dtype=torch.bfloat16)
        layer = make(num_dims).train()
        worst = max(worst, difference(copy.deepcopy(layer)(x), copy.deepcopy(layer)(x.float())))
    return worst, ""


@asks("property", "torch.compile gives the same result, in one graph", 1e-4, "see torch's notes on graph breaks")
def _(make: Make) -> Answer:
    worst = 0.0
    for num_dims in SHAPES:
        x = batch(num_dims, dtype=torch.float32)
        layer = make(num_dims).float().train()
        torch.compiler.reset()
        try:
            compiled = step(torch.compile(copy.deepcopy(layer), fullgraph=True), x)  # type: ignore[arg-type]
        except Exception as error:
            if "InvalidCxxCompiler" in str(error):
                raise NotApplicable("torch.compile needs a C++ compiler, and there is none") from error
            raise
        worst = max(worst, difference(compiled, step(copy.deepcopy(layer), x)))
    return worst, ""


@asks(
    "property",
    "two processes with unequal shares are as one (sync_batchnorm)",
    1e-9,
    "take count, mean and deviation over all processes, and the sums of the backward pass",
)
def _(make: Make) -> Answer:
    if not dist.is_available() or not dist.is_gloo_available():
        raise NotApplicable("this torch has no gloo")
    layer = make(4).double().train()
    try:
        LayerSync().put_in_step(copy.deepcopy(layer), "cpu")
    except UserError as error:
        raise NotApplicable("it has no attribute sync_batchnorm, and the flag is refused with it") from error
    whole = step(layer, batch(4))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    spawn(_one_share, (make, port, queue), nprocs=len(SHARES))  # type: ignore[no-untyped-call]
    y, dx, *gradients = (torch.from_numpy(part) for part in queue.get())
    found = difference([y, dx, *gradients], whole)
    x, axes = shares(batch(4)), all_but_channels(4)
    of_means = torch.stack([part.mean(axes) for part in x]).mean(0).view(1, -1, 1, 1)
    of_vars = torch.stack([part.var(axes, correction=0) for part in x]).mean(0).view(1, -1, 1, 1)
    averaged = (batch(4) - of_means) / (of_vars + eps_of(layer)).sqrt()
    apart = torch.cat([normalized(part, axes, eps_of(layer)) for part in x])
    if found > 1e-9 and difference(y, averaged) < 1e-6:
        return found, "it takes the mean of the processes' means, where each counts alike whatever its share"
    if found > 1e-9 and difference(y, apart) < 1e-6:
        return found, "each process normalizes its own share"
    return found, ""


def _one_share(rank: int, make: Make, port: int, queue: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=len(SHARES))
    layer = LayerSync().put_in_step(make(4).double().train(), "cpu")
    gradient = gradient_of(SHAPES[4])
    parts: list[Any] = [None] * len(SHARES)
    dist.all_gather_object(parts, step(layer, shares(batch(4))[rank], shares(gradient)[rank]))
    if rank == 0:
        ys, dxs, *gradients = zip(*parts, strict=True)
        queue.put([t.numpy() for t in (torch.cat(ys), torch.cat(dxs), *(sum(g) for g in gradients))])
    dist.destroy_process_group()


# Identity: whether it is torch's BatchNorm. For a norm of another kind it should not be.


@asks("identity", "output in training", 1e-6, "not over the axes of batch normalization, or not in its way")
def _(make: Make) -> Answer:
    worst, note = 0.0, ""
    for num_dims, layer, x in each(make):
        twin = torchs(layer, num_dims)
        found = max(difference(layer(batch(num_dims, seed)), twin(batch(num_dims, seed))) for seed in (1, 2))
        y = layer(x)
        found = max(found, difference(y, twin(x)))
        worst = max(worst, found)
        subsets = (a for n in range(1, num_dims + 1) for a in itertools.combinations(range(num_dims), n))
        for axes in subsets if found > 1e-6 and not note else ():
            if difference(y, normalized(x, axes, eps_of(layer))) < 1e-6:
                its, batch_norms = ([AXES[num_dims][a] for a in set_] for set_ in (axes, all_but_channels(num_dims)))
                note = f"it takes statistics over {', '.join(its)}; batch normalization over {', '.join(batch_norms)}"
    return worst, note


@asks("identity", "gradients by input and parameters", 1e-6, "")
def _(make: Make) -> Answer:
    return max(
        difference(gamma_and_beta(step(layer, x)), gamma_and_beta(step(torchs(layer, num_dims), x)))
        for num_dims, layer, x in each(make)
    ), ""


def gamma_and_beta(results: list[Tensor]) -> list[Tensor]:
    _, dx, *gradients = results
    if [g.numel() for g in gradients] != [FEATURES, FEATURES]:
        raise NotApplicable("it has not two parameters of one value per channel, gamma and beta")
    return [dx, *gradients]


@asks("identity", "running statistics after three steps", 1e-6, "")
def _(make: Make) -> Answer:
    worst, note = 0.0, ""
    for num_dims, layer, _ in each(make):
        twin = torchs(layer, num_dims)
        start = [torch.zeros(FEATURES, dtype=torch.float64), torch.ones(FEATURES, dtype=torch.float64)]
        axes = all_but_channels(num_dims)
        hypotheses = {
            "the running variance is biased: divided by m and not by m - 1": (0.1, 0),
            "the momentum is the wrong way round: the newest batch counts 0.9 and not 0.1": (0.9, 1),
            "biased running variance, and the momentum the wrong way round": (0.9, 0),
        }
        their: dict[str, list[Tensor]] = dict.fromkeys(hypotheses, start)
        for seed in range(3):
            x = batch(num_dims, seed)
            layer(x)
            twin(x)
            for name, (momentum, correction) in hypotheses.items():
                new = x.mean(axes), x.var(axes, correction=correction)
                their[name] = [old.lerp(now, momentum) for old, now in zip(their[name], new, strict=True)]
        found = difference(running(layer), running(twin))
        worst = max(worst, found)
        for name, values in their.items():
            if found > 1e-6 and not note and difference(running(layer), values) < 1e-6:
                note = name
    return worst, note


@asks("identity", "output in eval mode, by its own running statistics", 1e-6, "")
def _(make: Make) -> Answer:
    worst = 0.0
    for num_dims, layer, x in each(make):
        layer(x + 1)
        mean, var = (t.view(1, -1, *[1] * (num_dims - 2)) for t in running(layer))
        expected = (x - mean) / (var + eps_of(layer)).sqrt()
        worst = max(worst, difference(in_eval(layer, x), expected))
    return worst, ""


@asks("identity", "state dicts of the two interchange", 1e-6, "")
def _(make: Make) -> Answer:
    worst = 0.0
    for num_dims, layer, x in each(make):
        twin = torchs(layer, num_dims)
        if layer.state_dict().keys() != twin.state_dict().keys():
            raise NotApplicable(f"its names are others: {', '.join(layer.state_dict())}")
        layer(x)
        twin.load_state_dict(layer.state_dict())
        back = make(num_dims).double()
        back.load_state_dict(twin.state_dict())
        worst = max(worst, difference(in_eval(twin, x), in_eval(layer, x)))
        worst = max(worst, difference(in_eval(back, x), in_eval(layer, x)))
    return worst, ""


# Measured: ratios to torch's layer.


def _timed(num_dims: int, shape: tuple[int, ...]) -> Callable[[Make], Answer]:
    def answer(make: Make) -> Answer:
        layers = [make(num_dims, shape[1]).train(), registry.builtin(shape[1], num_dims)]
        x, gradient = torch.randn(shape, requires_grad=True), torch.randn(shape)
        seconds: list[list[float]] = [[], []]
        for _ in range(30):
            for layer, times in zip(layers, seconds, strict=True):
                start = time.perf_counter()
                layer(x).backward(gradient)
                times.append(time.perf_counter() - start)
        ours, theirs = (statistics.median(times[5:]) for times in seconds)
        return ours / theirs, f"{1e3 * ours:.2f} ms beside {1e3 * theirs:.2f} ms"

    return answer


for _dims, _shape in ((4, (256, 6, 24, 24)), (2, (256, 120))):
    asks("measured", f"time of a step, {' x '.join(map(str, _shape))}", float("inf"), "")(_timed(_dims, _shape))


@asks("measured", "memory kept for the backward pass", float("inf"), "")
def _(make: Make) -> Answer:
    kept = []
    for layer in (make(4), registry.builtin(FEATURES, 4)):
        storages: dict[int, int] = {}

        def pack(t: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(torch.randn(64, FEATURES, 24, 24, requires_grad=True))
        kept.append(sum(storages.values()))
    return kept[0] / kept[1], f"{kept[0]:,} bytes beside {kept[1]:,}"


def _make(name: str, norm_args: dict[str, Any], num_dims: int, num_features: int = FEATURES) -> nn.Module:
    return registry.make(name, num_features, num_dims, norm_args)


def examine(name: str, norm_args: dict[str, Any] | None = None) -> Iterator[Finding]:
    """Answer all questions about the norm of that name or import path, one finding at a time: a minute in all.

    Raises:
        UserError: an unknown norm, or arguments that it does not take.
    """
    make = partial(_make, name, norm_args or {})
    make(2), make(4)  # a user's mistake is none of the layer's
    for check in CHECKS:
        torch.manual_seed(0)
        yield check(make)


TITLES = {
    "property": "Properties, which any norm should have",
    "identity": "Identity with torch.nn.BatchNorm, which a norm of another kind should not have",
    "measured": "Measured, as a ratio to torch.nn.BatchNorm",
}


def main() -> None:
    """`check NORM`: print the table; exit with 1 where a property fails or, with --identical, an identity differs."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # of CUDA, which is not asked for
    parser = ArgumentParser(prog="python -m bn_lightning check", description="Examine a normalization layer.")
    parser.add_argument("norm", type=str, help=f"{', '.join(registry.NORMS)}, or an import path: package.module.Name")
    parser.add_argument(
        "--norm_args", type=dict[str, Any], default={}, help="Further arguments of the norm: --norm_args.eps 1e-3"
    )
    parser.add_argument("--identical", action="store_true", help="It is meant to be torch's BatchNorm, so fail if not.")
    parser.add_argument("--json", action="store_true", help="Print the findings as JSON.")
    args = parser.parse_args(sys.argv[2:])
    findings: list[Finding] = []
    for finding in examine(args.norm, args.norm_args):
        if not args.json:
            if not findings or findings[-1].section != finding.section:
                print(f"\n{TITLES[finding.section]}")
            print(line(finding), flush=True)
        findings.append(finding)
    bad = [f for f in findings if f.verdict == "FAIL" or (args.identical and f.verdict == "DIFFERS")]
    if args.json:
        versions = {"torch": torch.__version__, "bn_lightning": __version__}
        print(
            json.dumps(
                {"norm": args.norm, "passed": not bad, **versions, "findings": list(map(asdict, findings))}, indent=2
            )
        )
    else:
        counts = Counter(f.verdict for f in findings if f.section != "measured")
        print(f"\n{args.norm}: {', '.join(f'{number} {verdict}' for verdict, number in counts.items())}")
    sys.exit(1 if bad else 0)


def line(finding: Finding) -> str:
    """The finding as a line of the table, its note below."""
    number = "" if finding.difference is None else f"{finding.difference:.2g}"
    note = "".join(f"\n      {part}" for part in textwrap.wrap(finding.note, 110))
    return f"  {finding.question:66}{finding.verdict:>9}{number:>10}{note}"
