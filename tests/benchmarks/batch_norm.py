"""Compare `BatchNorm` with PyTorch's layer: time and memory, in a network and per layer.

    python tests/benchmarks/batch_norm.py [--threads 1 2] [--device cuda] [--compile]
        [--rounds 41] [--network resnet --batch_size 128]

The candidates are LeNet, or another network, with norm `builtin` (PyTorch's layer),
`custom` (`BatchNorm`) and `none`, each in contiguous and channels-last layout.
--compile adds compiled versions of `builtin` and `custom`.

Each round runs the candidates in a new random order. Each candidate runs a warm-up
step, then the timed steps. A ratio compares two candidates within the same round. The
output shows the median and the 5th and 95th percentile over all rounds. "Best layout"
is the layout with the lower median.

* training step:   zero_grad, forward, cross-entropy, backward and SGD step for random
                   images
* evaluation:      forward in eval mode and inference mode
* layer by layer:  (for LeNet only) each norm layer alone: forward with backward, and forward in
                   eval mode
* memory:          (for LeNet only) bytes that a layer saves for the backward pass,
                   including its input

Each number of threads is measured in a separate process. On a GPU there is one process,
and each measurement waits until the GPU is idle.

As in `fit`, glibc keeps freed memory. Otherwise page faults, which do not depend on the
layers, would take a large part of the time. --stock-allocator keeps glibc's default.
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

from bn_lightning import BatchNorm
from bn_lightning.networks.registry import ImageShape, build
from bn_lightning.runs.process import keep_freed_memory

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# Shapes of the inputs of norm1 to norm4 in LeNet.
SHAPES = ((256, 6, 24, 24), (256, 16, 8, 8), (256, 120), (256, 84))

# (norm, layout) for a network, (norm,) for a single layer.
Candidate = tuple[str, ...]

Step = Callable[[], object]

# Milliseconds per step, one value for each round.
Times = dict[Candidate, np.ndarray]


def measure(candidates: dict[Candidate, Step], args: argparse.Namespace, steps: int) -> Times:
    """Return the milliseconds per step of each candidate in each round."""
    synchronize = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    order = list(candidates)
    times = {candidate: np.empty(args.rounds) for candidate in candidates}
    # Two warm-up rounds, -2 and -1, compile code and fill caches. They are not recorded.
    for number in range(-2, args.rounds):
        random.shuffle(order)
        for candidate in order:
            step = candidates[candidate]
            step()
            synchronize()
            start = time.perf_counter()
            for _ in range(steps):
                step()
            synchronize()
            if number >= 0:
                times[candidate][number] = (time.perf_counter() - start) * 1e3 / steps
    return times


def format_ratio(numerator: np.ndarray, denominator: np.ndarray) -> str:
    """Return the median ratio over the rounds, with its 5th and 95th percentile."""
    ratios = numerator / denominator
    low, high = np.percentile(ratios, [5, 95])
    return f"{np.median(ratios):8.3f}  ({low:.3f} to {high:.3f})"


def print_network_times(title: str, times: Times) -> None:
    def best(norm: str) -> Candidate:
        candidates = [(norm, layout) for layout in LAYOUTS]
        return min(candidates, key=lambda candidate: float(np.median(times[candidate])))

    baseline = best("builtin")
    print(f"\n{title:33} {'ms':>7}   / {' '.join(baseline)}")
    for candidate, values in times.items():
        name = f"{candidate[0]:16} {candidate[1]:13}"
        print(f"  {name} {np.median(values):8.3f}  {format_ratio(values, times[baseline])}")

    compiled = ("custom compiled", "builtin compiled")
    for norm, reference in (("custom", "builtin"), ("none", "builtin"), compiled):
        if (norm, "contiguous") not in times:
            continue
        name = f"{norm}, best layout / {reference}, best layout:"
        ratio = format_ratio(times[best(norm)], times[best(reference)])
        print(f"  {name:63} {ratio}")
        name = f"{norm} channels_last / {reference} channels_last:"
        ratio = format_ratio(times[norm, "channels_last"], times[reference, "channels_last"])
        print(f"  {name:63} {ratio}")


def compare_networks(args: argparse.Namespace) -> None:
    images = torch.rand(args.batch_size, 1, 28, 28, device=args.device)
    labels = torch.randint(10, (args.batch_size,), device=args.device)

    def training_step(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()

    candidates: dict[Candidate, nn.Module] = {}
    norms = ["builtin", "custom", "none"]
    if args.compile:
        norms += ["builtin compiled", "custom compiled"]
    for norm in norms:
        for layout, memory_format in LAYOUTS.items():
            torch.manual_seed(0)
            network = build(args.network, ImageShape(1, (28, 28), 10), norm.split()[0])
            network = network.to(args.device, memory_format=memory_format)
            if norm.endswith("compiled"):
                network.compile()
            candidates[norm, layout] = network

    steps: dict[Candidate, Step] = {}
    for candidate, network in candidates.items():
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        steps[candidate] = partial(training_step, network, optimizer)
    print_network_times("training step", measure(steps, args, args.steps))

    with torch.inference_mode():
        forwards = {
            candidate: partial(network.eval(), images) for candidate, network in candidates.items()
        }
        print_network_times("evaluation", measure(forwards, args, 4 * args.steps))


def make_layers(shape: tuple[int, ...], device: str) -> dict[Candidate, nn.Module]:
    builtin = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    return {
        ("builtin",): builtin(shape[1]).to(device),
        ("custom",): BatchNorm(shape[1]).to(device),
    }


def compare_layers(args: argparse.Namespace) -> None:
    def make_step(layer: nn.Module, x: torch.Tensor, training: bool) -> Step:
        layer.train(training)
        if not training:
            return partial(layer, x)
        inputs = (x, *layer.parameters())
        grad = torch.randn_like(x)
        return lambda: torch.autograd.grad(layer(x), inputs, grad)

    header = f"{'builtin ms':>10} {'custom ms':>10}    custom / builtin"
    print(f"\n{'layer by layer':52} {header}")
    for shape in SHAPES:
        for layout in LAYOUTS if len(shape) == 4 else ["contiguous"]:
            x = torch.randn(shape, device=args.device).to(memory_format=LAYOUTS[layout])
            x.requires_grad_()
            for mode, training in (("forward, backward", True), ("eval forward", False)):
                candidates = {
                    candidate: make_step(layer, x, training)
                    for candidate, layer in make_layers(shape, args.device).items()
                }
                with torch.inference_mode(not training):
                    times = measure(candidates, args, 5 * args.steps)
                columns = " ".join(f"{np.median(values):10.3f}" for values in times.values())
                ratio = format_ratio(times["custom",], times["builtin",])
                print(f"  {shape!s:17} {layout:14} {mode:17} {columns}  {ratio}")


def compare_memory(args: argparse.Namespace) -> None:
    def saved_bytes(layer: nn.Module, x: torch.Tensor) -> int:
        saved: list[torch.Tensor] = []
        # No backward pass follows, so the unpack hook is never called.
        with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None):
            layer(x)
        # Tensors that share a storage are counted once.
        storages = [tensor.untyped_storage() for tensor in saved]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        return sum(sizes.values())

    shape = SHAPES[0]
    title = f"bytes saved for backward, {shape}"
    print(f"\n{title:52} {'builtin':>10} {'custom':>10}   input only")
    for dtype in (torch.float32, torch.bfloat16):
        for layout, memory_format in LAYOUTS.items():
            x = torch.randn(shape, device=args.device, dtype=dtype)
            x = x.to(memory_format=memory_format).requires_grad_()
            layers = make_layers(shape, args.device).values()
            columns = " ".join(f"{saved_bytes(layer, x):10,}" for layer in layers)
            input_bytes = x.untyped_storage().nbytes()
            print(f"  {dtype!s:17} {layout:32} {columns} {input_bytes:12,}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        default=[1, 2],
        help="numbers of CPU threads; each is measured in a separate process (default: 1 2)",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="device (default: cpu)"
    )
    parser.add_argument("--compile", action="store_true", help="also measure compiled networks")
    parser.add_argument("--network", default="lenet", help="name of the network (default: lenet)")
    parser.add_argument("--batch_size", type=int, default=256, help="images per step (256)")
    parser.add_argument("--rounds", type=int, default=41, help="number of rounds (default: 41)")
    parser.add_argument(
        "--steps",
        type=int,
        default=4,
        help="training steps per round (default: 4); evaluation has 4 times as many "
        "steps, single layers 5 times as many",
    )
    parser.add_argument(
        "--stock-allocator",
        action="store_true",
        help="keep the default memory settings of glibc",
    )
    args = parser.parse_args()
    if args.device == "cpu" and len(args.threads) > 1:
        for threads in args.threads:
            # argparse uses the last --threads.
            command = [sys.executable, "-u", __file__, *sys.argv[1:]]
            subprocess.run([*command, "--threads", str(threads)], check=True)
        return
    if not args.stock_allocator:
        keep_freed_memory()
    if args.compile:
        # LeNet.forward is compiled once per candidate and mode.
        # The default limit could be too low for that.
        torch._dynamo.config.recompile_limit = 64
    torch.set_num_threads(args.threads[0])

    device = f"cpu, threads: {args.threads[0]}"
    if args.device == "cuda":
        device = torch.cuda.get_device_name()
    allocator = "default" if args.stock_allocator else "keeps freed memory"
    rounds = f"{args.rounds} rounds of {args.steps} steps"
    print(f"\n{device}; torch {torch.__version__}; allocator: {allocator}; {rounds}")
    print("Times are medians in ms.")
    print("Ratios are medians over the rounds (5th to 95th percentile).")
    compare_networks(args)
    if args.network == "lenet":
        compare_layers(args)
        compare_memory(args)


if __name__ == "__main__":
    main()
