"""Properties of the output for inputs at the edge: constant, one sample, no sample."""

import itertools
from collections.abc import Iterator
from math import inf

import torch

from bn_lightning.norms.check import inputs, reference
from bn_lightning.norms.check.findings import Comparison, NotApplicable, norm_property
from bn_lightning.norms.check.subject import Norm
from bn_lightning.norms.definition import per_channel


@norm_property(
    "results",
    "For constant input, the output is beta, and all gradients are finite.",
    advice="A constant channel has variance 0. Add eps to the variance before taking the square "
    "root.",
    script="""
x = torch.full_like(x, 3.3).requires_grad_()
layer(x).square().sum().backward()
assert x.grad.isfinite().all() and layer(x).isfinite().all()
""",
)
def constant_input(norm: Norm) -> Iterator[Comparison]:
    for case in itertools.chain(norm.cases(), norm.cases(dtype=torch.float16)):
        one_channel = case.x
        one_channel[:, 0] = 0.7
        for x in (torch.full_like(case.x, 3.3), torch.zeros_like(case.x), one_channel):
            results = inputs.step(case.layer(), x, case.gradient)
            if case.dtype == torch.float16:
                # 1 / eps, which is in the gradient, may exceed the largest float16.
                results = {"output": results["output"]}
            is_finite = inputs.is_finite(results)
            cause = "" if is_finite else "The output or a gradient is NaN or infinite. "
            yield Comparison(0 if is_finite else inf, 0, cause and cause + constant_input.advice)
        fit = case.kind.fit
        is_exact = case.dtype != torch.float16 and case.training
        if is_exact and fit is not None and fit.name == reference.CENTRING:
            y = case.layer()(torch.full_like(case.x, 3.3)).detach().double()
            expected = per_channel(fit.shift, y).expand_as(y)
            tolerance = 1e-3 if case.kind.computes_in == torch.float64 else 0.1
            cause = "The output for constant input is not beta."
            yield Comparison(inputs.difference(y, expected), tolerance, cause)


@norm_property(
    "results",
    "A batch of one sample is normalized in the same way.",
    advice="Do not treat a batch of one sample differently.",
    script="""
one = layer(x[:1])
assert one.isfinite().all() and layer.eval()(x).isfinite().all()
if not layer.training:
    assert_close(one, layer(x)[:1])
""",
)
def one_sample(norm: Norm) -> Iterator[Comparison]:
    was_examined = False
    reason = "Each channel of one sample has one value, which PyTorch's layer rejects too."
    for case in norm.cases(batch_sizes=(1,)):
        if case.training and case.kind.has_one_value(case.x):
            continue
        layer = case.layer()
        try:
            with torch.set_grad_enabled(case.training):
                y = layer(case.x).detach()
        except ValueError as error:
            if not case.training:
                raise
            reason = f"In training, the layer rejects a batch of one sample: {error}"
            continue
        was_examined = True
        is_finite = inputs.is_finite([y, inputs.evaluate(layer, case.x)])
        yield Comparison(
            0 if is_finite else inf,
            0,
            "After a batch of one sample, an output is NaN or infinite.",
        )
        if not case.training and not case.kind.normalizes_batch_in_evaluation:
            more = inputs.batch((3, *case.shape[1:]), 4).to(case.dtype)
            more[:1] = case.x
            yield Comparison(
                inputs.difference(y, inputs.evaluate(case.layer(), more)[:1]), case.tolerance
            )
        elif case.training and case.kind.fit is not None:
            expected = case.kind.fit.output(case.x.double(), case.kind.groups_of(case.x))
            yield Comparison(inputs.difference(y, expected), max(1e-4, 10 * case.tolerance))
    if not was_examined:
        raise NotApplicable(reason)


@norm_property(
    "results",
    "An empty batch gives an empty output and leaves the state finite.",
    script="""
assert layer(x[:0]).shape == x[:0].shape
assert layer.eval()(x).isfinite().all()
""",
)
def empty_batch(norm: Norm) -> Iterator[Comparison]:
    reason = ""
    was_examined = False
    for case in norm.cases(batch_sizes=(12,)):
        shapes = [(0, *case.shape[1:])]
        if len(case.shape) > 2:
            shapes.append((*case.shape[:-1], 0))
        for shape in shapes:
            layer = case.layer()
            try:
                y = layer(torch.zeros(shape, dtype=case.dtype))
            except Exception as error:
                reason = f"The layer does not accept input of shape {shape}: {error}"
                continue
            was_examined = True
            is_right = y.shape == shape
            cause = f"The output for input of shape {shape} has shape {tuple(y.shape)}."
            yield Comparison(0 if is_right else inf, 0, cause)
            if not inputs.is_finite([inputs.evaluate(layer, case.x)]):
                raise NotApplicable(
                    "The layer does not support empty batches: they make its state NaN. Skip the "
                    "update of the running statistics."
                )
    if not was_examined:
        raise NotApplicable(reason.partition("\n")[0])
