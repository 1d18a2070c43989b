"""Compare the rounding errors of `BatchNorm` with those of PyTorch's layer.

    python tests/benchmarks/precision.py [--seeds 8]

The input has standard deviation 1 and a mean from 0 to 10,000, and is rounded to its dtype.
Gamma and beta are random. The exact results are those of PyTorch's layer in float64, for
the same rounded input. An error is the root mean square over all values and seeds.

Each number is the error of `BatchNorm`, divided by that of PyTorch's layer: the median over
shapes and memory formats, and the largest in parentheses. "Parameters" is the dtype of
gamma, beta and the running statistics.
"""

import argparse
from collections import defaultdict

import numpy as np
import torch
from torch import nn

from bn_lightning import BatchNorm

SHAPES = ((256, 120), (256, 6, 24, 24), (256, 16, 8, 8), (32, 64, 14, 14))
MEANS = (0, 1, 10, 100, 1_000, 10_000)
# Dtypes of the input and of the parameters.
DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
)
RESULTS = ("y", "d x", "d gamma", "d beta", "running mean", "running var")
Dtypes = tuple[torch.dtype, torch.dtype]


def results(layer: nn.Module, state: list[torch.Tensor], x: torch.Tensor, dy: torch.Tensor):
    """Return output, gradients and running statistics in float64, in the order of RESULTS."""
    tensors = [layer.weight, layer.bias, layer.running_mean, layer.running_var]
    with torch.no_grad():
        for tensor, value in zip(tensors, state, strict=True):
            tensor.copy_(value)
    x = x.detach().requires_grad_()
    y = layer(x)
    gradients = torch.autograd.grad(y, (x, *tensors[:2]), dy)
    return [value.detach().double() for value in (y, *gradients, *tensors[2:])]


def square_errors(
    shape: tuple[int, ...], order: torch.memory_format, mean: float, dtypes: Dtypes, training: bool
) -> np.ndarray:
    """Return the mean square error of each result, for `BatchNorm` and for PyTorch's layer."""
    input_dtype, dtype = dtypes
    x = (torch.randn(shape, dtype=torch.float64) + mean).to(input_dtype, memory_format=order)
    dy = torch.randn(shape).to(input_dtype, memory_format=order)
    gamma, beta = torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
    statistics = [torch.zeros(shape[1]), torch.ones(shape[1])]
    if not training:
        channels = x.double().transpose(0, 1).flatten(1)
        statistics = [channels.mean(1), channels.var(1) + 1e-3]
    state = [value.to(dtype) for value in (gamma, beta, *statistics)]
    torchs = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    exact = results(torchs(shape[1]).double().train(training), state, x.double(), dy.double())
    errors = []
    for kind in (BatchNorm, torchs):
        found = results(kind(shape[1], dtype=dtype).train(training), state, x, dy)
        errors.append([(a - b).square().mean() for a, b in zip(found, exact, strict=True)])
    return np.array(errors)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=8, help="number of seeds (default: 8)")
    seeds = parser.parse_args().seeds
    orders = {2: [torch.contiguous_format], 4: [torch.contiguous_format, torch.channels_last]}
    for training in (True, False):
        names = RESULTS if training else RESULTS[:4]
        print(f"\n{'training' if training else 'evaluation'}")
        print(f"{'input':9} {'parameters':10} {'mean':>6}" + "".join(f"{n:>15}" for n in names))
        for dtypes in DTYPES:
            for mean in MEANS:
                ratios = defaultdict(list)
                for shape in SHAPES:
                    for order in orders[len(shape)]:
                        torch.manual_seed(0)
                        case = (shape, order, mean, dtypes, training)
                        ours, theirs = sum(square_errors(*case) for _ in range(seeds))
                        for name, our, their in zip(RESULTS, ours, theirs, strict=True):
                            # Both are exact if all values can be represented.
                            ratio = 1.0 if our == their == 0 else (our / their) ** 0.5
                            ratios[name].append(ratio)
                cells = (f"{np.median(ratios[n]):7.2f} ({max(ratios[n]):5.2f})" for n in names)
                words = [str(dtype).removeprefix("torch.") for dtype in dtypes]
                print(f"{words[0]:9} {words[1]:10} {mean:>6,}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
