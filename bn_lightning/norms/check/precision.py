"""Properties of precision: float32, 16 bits, mixed precision, large means, large values.

The reference is the same layer in float64, whose gradients are compared with finite
differences elsewhere.
"""

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bn_lightning.norms.check import inputs
from bn_lightning.norms.check.findings import Comparison, NotApplicable, norm_property
from bn_lightning.norms.check.kinds import Kind
from bn_lightning.norms.check.subject import TOLERANCES, Case, Norm

# Sizes of the positions of a large batch.
LARGE = {2: (), 3: (2048,), 4: (64, 32), 5: (16, 16, 8)}
NO_FLOAT64 = "The layer does not accept float64, the reference."
SCRIPT = """
exact = copy.deepcopy(layer).double()(x.double())
y = layer(x)
assert y.dtype == x.dtype
assert_close(y.double(), exact, rtol=TOLERANCE, atol=TOLERANCE)
"""


def _has_float64(kind: Kind) -> bool:
    return kind.dtype == torch.float64


def _normalizes_batch(kind: Kind) -> bool:
    return _has_float64(kind) and not kind.reads_past and kind.has_groups


def _exact(layer: nn.Module, x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """Return the results of a step of a layer in float64."""
    return inputs.step(copy.deepcopy(layer).double(), x.double(), gradient.double())


@norm_property(
    "input",
    "Output and gradients in float32 are accurate to float32 precision.",
    advice="The layer computes with fewer than 32 bits, or casts its state.",
    script=SCRIPT.replace("TOLERANCE", "1e-3"),
)
def float32(norm: Norm) -> Iterator[Comparison]:
    cases = norm.cases(dtype=torch.float32, only=_has_float64, otherwise=NO_FLOAT64)
    for case in cases:
        cause = "The layer computes with 16 bits. Compute in float32."
        is_coarse = case.kind.computes_in == torch.bfloat16
        yield Comparison(float(is_coarse), 0.5, cause)
        layer, x, g = case.layer(), case.x, case.gradient
        expected = _exact(layer, x, g)
        yield Comparison(inputs.difference(inputs.step(layer, x, g), expected), case.tolerance)


@norm_property(
    "input",
    "Output and gradients in bfloat16 are accurate to bfloat16 precision.",
    advice="Compute the statistics in float32: x = x.float().",
    script=SCRIPT.replace("TOLERANCE", "0.1"),
)
def bfloat16(norm: Norm) -> Iterator[Comparison]:
    yield from _sixteen_bits(norm, torch.bfloat16)


@norm_property(
    "input",
    "Output and gradients in float16 are accurate to float16 precision, also for 8,192 values.",
    advice="Compute the statistics in float32: x = x.float(). The largest float16 is 65,504, which "
    "a sum of 8,192 values exceeds.",
    script=SCRIPT.replace("TOLERANCE", "0.05"),
)
def float16(norm: Norm) -> Iterator[Comparison]:
    yield from _sixteen_bits(norm, torch.float16)
    for kind in norm.kinds.values():
        if not _has_float64(kind):
            continue
        case = norm.one_case(kind, 12, training=True, dtype=torch.float16)
        layer = case.layer()
        x = inputs.batch((8192 if kind.num_dims == 2 else 4, kind.features, *LARGE[kind.num_dims]))
        x = (4 * x + 12).half()
        expected = copy.deepcopy(layer).double()(x.double())
        yield Comparison(inputs.difference(layer(x), expected), 2 * case.tolerance)
        # The running statistics of the layers are compared too.
        ys = [layer.eval()(x[:12]), copy.deepcopy(layer).double().eval()(x[:12].double())]
        yield Comparison(inputs.difference(*ys), 2 * case.tolerance)


def _sixteen_bits(norm: Norm, dtype: torch.dtype) -> Iterator[Comparison]:
    cases = norm.cases(dtype=dtype, batch_sizes=(12,), only=_has_float64, otherwise=NO_FLOAT64)
    for case in cases:
        layer, x, g = case.layer(), case.x, case.gradient
        expected = _exact(layer, x, g)
        found = inputs.step(layer, x, g)
        yield Comparison(inputs.difference(found, expected), case.tolerance)
        dtypes = {t.dtype for t in (found["output"], found["input"])}
        cause = f"The output for {dtype} input has {found['output'].dtype}."
        yield Comparison(len(dtypes - {dtype}), 0, cause)


@norm_property(
    "input",
    "Input of 16 bits is accepted with parameters of 32 bits, as with mixed precision.",
    advice="With mixed precision, parameters and buffers stay float32, and the input has 16 bits. "
    "Cast the input, x = x.float(), and the output back, y.to(input.dtype).",
    script="""
with torch.autocast("cpu", dtype=torch.bfloat16):
    y = layer(x.bfloat16())
assert_close(y.float(), layer(x.bfloat16().float()), rtol=0.1, atol=0.1)
""",
)
def mixed_precision(norm: Norm) -> Iterator[Comparison]:
    for dtype in (torch.bfloat16, torch.float16):
        for case in norm.cases(dtype=torch.float32, batch_sizes=(12,)):
            # Other operations, such as convolutions, need autocast.
            regions: list[Any] = [torch.autocast("cpu", dtype=dtype)]
            regions += [nullcontext()] if case.kind.is_affine else []
            if case.kind.is_affine:
                # Autocast computes matrix products in 16 bits, also those of float32 input.
                x = case.x + 30
                with regions[0]:
                    y = case.layer()(x)
                cause = f"With autocast to {dtype}, float32 input is computed with 16 bits."
                yield Comparison(inputs.difference(y, case.layer()(x)), 2e-2, cause)
            for region in regions:
                layer, x = case.layer(), case.x.to(dtype)
                expected = inputs.step(case.layer(), x.float(), case.gradient)
                leaf = x.detach().requires_grad_()
                with region:
                    y = layer(leaf)
                y.backward(case.gradient.to(y.dtype))
                found = {"output": y, "input": leaf.grad}
                found |= {n: p.grad for n, p in layer.named_parameters() if n in expected}
                if case.kind.is_affine:
                    yield Comparison(inputs.difference(found, expected), 2 * TOLERANCES[dtype])
                else:
                    # Autocast rounds the other operations too.
                    is_finite = inputs.is_finite(found)
                    yield Comparison(0 if is_finite else float("inf"), 0)
                after = layer.eval()(case.x)
                expected_after = inputs.difference(after, _after(case, x))
                yield Comparison(expected_after, 2 * TOLERANCES[dtype])


def _after(case: Case, x: Tensor) -> Tensor:
    """Return the output in evaluation after a step with x in float32."""
    layer = case.layer()
    layer(x.float())
    y: Tensor = layer.eval()(case.x)
    return y


@norm_property(
    "input",
    "Output and gradient are accurate for a mean of 10,000 and a deviation of 1, in float32.",
    advice="The variance is probably computed as mean(x²) - mean(x)², which cancels. Use "
    "mean((x - mean(x))²).",
    script="""
layer, x = layer.float().train(), (x + 1e4).float()
exact = copy.deepcopy(layer).double()(x.double())
assert_close(layer(x).double(), exact, rtol=0.02, atol=0.02)
""",
)
def large_mean(norm: Norm) -> Iterator[Comparison]:
    cases = norm.cases(
        training=(True,),
        dtype=torch.float32,
        batch_sizes=(12,),
        only=_normalizes_batch,
        otherwise="The layer does not normalize a batch by its own statistics in float64.",
    )
    for case in cases:
        layer, g = case.layer(), case.gradient
        x = (inputs.random(case.shape, 3) + 1e4).float()
        found, expected = inputs.step(copy.deepcopy(layer), x, g), _exact(layer, x, g)
        # The distance of two float32 numbers near 10,000 is 0.001.
        tolerance = 20 * max(_error_of_pytorch(x), 1e-3)
        yield Comparison(inputs.difference(found, expected), tolerance)


def _error_of_pytorch(x: Tensor) -> float:
    """Return the largest error of PyTorch's normalizations for this input."""

    def outputs(x: Tensor) -> list[Tensor]:
        by_channel = x.movedim(1, -1)
        return [
            F.batch_norm(x, None, None, training=True),
            F.group_norm(x, 1),
            F.layer_norm(by_channel, by_channel.shape[-1:]),
        ]

    return inputs.difference(outputs(x), outputs(x.double()))


@norm_property(
    "input",
    "Large values do not overflow: 1e15 in float32, and 20,000 in float16.",
    advice="The squares of the values overflow. Compute 16-bit input in float32.",
    script="""
x = (x / x.abs().max() * 2e4).half()
layer = layer.half()
exact = copy.deepcopy(layer).double()(x.double())
assert_close(layer(x).double(), exact, rtol=0.1, atol=0.1)
""",
)
def large_values(norm: Norm) -> Iterator[Comparison]:
    for dtype, size in ((torch.float32, 1e15), (torch.float16, 2e4)):
        cases = norm.cases(
            training=(True,),
            dtype=dtype,
            batch_sizes=(12,),
            only=_normalizes_batch,
            otherwise="The layer does not normalize a batch by its own statistics in float64.",
        )
        for case in cases:
            layer, x = case.layer(), case.x.double()
            x = (size * x / x.abs().max()).to(dtype)
            expected = copy.deepcopy(layer).double()(x.double())
            error = inputs.difference(layer(x), expected)
            if dtype == torch.float16 and not error <= 0.1 and _computes_in_float16(case):
                raise NotApplicable(
                    "The layer computes float16 input in float16, whose largest number is 65,504: "
                    "squares of values above 255 overflow. Compute in float32."
                )
            yield Comparison(error, 10 * TOLERANCES[dtype])


def _computes_in_float16(case: Case) -> bool:
    """Return whether a layer rounds between its operations, as one that computes in float16."""
    layer = case.layer()
    expected = copy.deepcopy(layer).double()(case.x.double())
    y = layer(case.x).double()
    # Correct rounding of the output alone changes it by less than this.
    return bool(((y - expected).abs() > 6e-4 * expected.abs() + 1e-4).any())
