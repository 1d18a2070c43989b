"""Time and memory of `BatchNorm` beside torch's own layer, in the whole network and layer by layer.

    python tests/benchmarks/batch_norm.py [--threads 1 2] [--device cuda] [--compile] [--rounds 41]

The sides are LeNet with `norm` builtin (torch's layer), custom (`BatchNorm`) and none, each in contiguous and in
channels-last layout; --compile adds builtin and custom compiled. They take turns: in every round each side, in an
order drawn anew, does one step to warm up and then some timed ones. A ratio is that of two sides in the same round,
and is printed as median and 5th to 95th percentile over the rounds. "Best" is the layout with the lower median.

* training step:   zero_grad, forward, cross-entropy, backward and a step of SGD on 256 random images
* evaluation:      the forward of the network in eval mode, in inference mode
* layer by layer:  the layer alone at each place of LeNet, forward with backward and the forward in eval mode
* memory:          the storages that a layer keeps for the backward pass, the input's own among them

Each number of threads is measured in a process of its own; on a GPU there is one process, and the clock is read when
the GPU has nothing left to do. As in `fit`, glibc keeps freed memory, on all sides: otherwise page faults, which say
nothing of the layers, would take much of the time. --stock-allocator leaves that out.
"""

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from bn_lightning import BatchNorm, LeNet
from bn_lightning.runs.process import keep_freed_memory

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SHAPES = ((256, 6, 24, 24), (256, 16, 8, 8), (256, 120), (256, 84))  # at norm1 to norm4 of LeNet
Side = tuple[str, ...]  # the norm, and in a network the layout
Step = Callable[[], object]
Times = dict[Side, np.ndarray]  # milliseconds of one step, a number for each round


def measure(sides: dict[Side, Step], args: argparse.Namespace, steps: int) -> Times:
    synchronize = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    order, times = list(sides), {side: np.empty(args.rounds) for side in sides}
    for number in range(
        -2, args.rounds
    ):  # the first two, in which compilers and caches settle, do not count
        random.shuffle(order)
        for side in order:
            step = sides[side]
            step()
            synchronize()
            start = time.perf_counter()
            for _ in range(steps):
                step()
            synchronize()
            if number >= 0:
                times[side][number] = (time.perf_counter() - start) * 1e3 / steps
    return times


def ratio(above: np.ndarray, below: np.ndarray) -> str:
    low, high = np.percentile(above / below, [5, 95])
    return f"{np.median(above / below):8.3f}  ({low:.3f} to {high:.3f})"


def report(title: str, times: Times) -> None:
    def best(norm: str) -> Side:
        return min(
            ((norm, layout) for layout in LAYOUTS), key=lambda side: float(np.median(times[side]))
        )

    base = best("builtin")
    print(f"\n{title:33} {'ms':>7}   / {' '.join(base)}")
    for side, values in times.items():
        print(f"  {side[0]:16} {side[1]:13} {np.median(values):8.3f}  {ratio(values, times[base])}")
    for above, below in (
        ("custom", "builtin"),
        ("none", "builtin"),
        ("custom compiled", "builtin compiled"),
    ):
        if (above, "contiguous") in times:
            name = f"{above}, best layout / {below}, best layout:"
            print(f"  {name:63} {ratio(times[best(above)], times[best(below)])}")
            name = f"{above} channels_last / {below} channels_last:"
            print(
                f"  {name:63} {ratio(times[above, 'channels_last'], times[below, 'channels_last'])}"
            )


def networks(args: argparse.Namespace) -> None:
    images = torch.rand(256, 1, 28, 28, device=args.device)
    labels = torch.randint(10, (256,), device=args.device)

    def training_step(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()

    sides: dict[Side, nn.Module] = {}
    for norm in (
        "builtin",
        "custom",
        "none",
        *(("builtin compiled", "custom compiled") if args.compile else ()),
    ):
        for layout, memory_format in LAYOUTS.items():
            torch.manual_seed(0)
            network = LeNet(norm=norm.split()[0]).to(args.device, memory_format=memory_format)
            if norm.endswith("compiled"):
                network.compile()
            sides[norm, layout] = network
    optimizers = {
        side: torch.optim.SGD(network.parameters(), lr=0.1) for side, network in sides.items()
    }
    steps = {
        side: partial(training_step, network, optimizers[side]) for side, network in sides.items()
    }
    report("training step", measure(steps, args, args.steps))
    with torch.inference_mode():
        forwards = {side: partial(network.eval(), images) for side, network in sides.items()}
        report("evaluation", measure(forwards, args, 4 * args.steps))


def make_layers(shape: tuple[int, ...], args: argparse.Namespace) -> dict[Side, nn.Module]:
    builtin = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    return {
        ("builtin",): builtin(shape[1]).to(args.device),
        ("custom",): BatchNorm(shape[1]).to(args.device),
    }


def layers(args: argparse.Namespace) -> None:
    def make_step(layer: nn.Module, x: torch.Tensor, training: bool) -> Step:
        layer.train(training)
        wanted, grad = (x, *layer.parameters()), torch.randn_like(x)
        return (
            (lambda: torch.autograd.grad(layer(x), wanted, grad)) if training else partial(layer, x)
        )

    print(f"\n{'layer by layer':52} {'builtin ms':>10} {'custom ms':>10}    custom / builtin")
    for shape in SHAPES:
        for layout in LAYOUTS if len(shape) == 4 else ["contiguous"]:
            x = (
                torch.randn(shape, device=args.device)
                .to(memory_format=LAYOUTS[layout])
                .requires_grad_()
            )
            for what, training in (("forward, backward", True), ("eval forward", False)):
                sides = {
                    side: make_step(layer, x, training)
                    for side, layer in make_layers(shape, args).items()
                }
                with torch.inference_mode(not training):
                    times = measure(sides, args, 5 * args.steps)
                columns = " ".join(f"{np.median(values):10.3f}" for values in times.values())
                print(
                    f"  {shape!s:17} {layout:14} {what:17} {columns}  {ratio(times['custom',], times['builtin',])}"
                )


def memory(args: argparse.Namespace) -> None:
    def kept_bytes(layer: nn.Module, x: torch.Tensor) -> int:
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            kept.append, lambda _: None
        ):  # no backward follows
            layer(x)
        return sum(
            {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values()
        )

    shape = SHAPES[0]
    print(
        f"\n{f'bytes kept for backward, {shape}':52} {'builtin':>10} {'custom':>10}   the input alone"
    )
    for dtype in (torch.float32, torch.bfloat16):
        for layout, memory_format in LAYOUTS.items():
            x = (
                torch.randn(shape, device=args.device, dtype=dtype)
                .to(memory_format=memory_format)
                .requires_grad_()
            )
            columns = " ".join(
                f"{kept_bytes(layer, x):10,}" for layer in make_layers(shape, args).values()
            )
            print(f"  {dtype!s:17} {layout:32} {columns} {x.untyped_storage().nbytes():17,}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        default=[1, 2],
        help="on the CPU, a process for each number",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="measure compiled networks too")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument(
        "--steps",
        type=int,
        default=4,
        help="in training; 4 times that in evaluation, 5 for a layer",
    )
    parser.add_argument("--stock-allocator", action="store_true", help="leave glibc as it is")
    args = parser.parse_args()
    if args.device == "cpu" and len(args.threads) > 1:
        for threads in args.threads:  # of a flag given twice the last counts
            subprocess.run(
                [sys.executable, "-u", __file__, *sys.argv[1:], "--threads", str(threads)],
                check=True,
            )
        return
    if not args.stock_allocator:
        keep_freed_memory()
    if args.compile:
        torch._dynamo.config.recompile_limit = (
            64  # LeNet.forward is compiled once for each side and mode
        )
    torch.set_num_threads(args.threads[0])
    where = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"cpu, threads: {args.threads[0]}"
    )
    allocator = "as it comes" if args.stock_allocator else "keeps freed memory"
    print(
        f"\n{where}; torch {torch.__version__}; allocator {allocator}; {args.rounds} rounds of {args.steps} steps"
    )
    print("ms: median. Ratios, by round: median (5th to 95th percentile)")
    networks(args)
    layers(args)
    memory(args)


if __name__ == "__main__":
    main()
