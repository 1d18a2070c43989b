"""Properties of the output: shape, formula, and parameters."""

from collections.abc import Iterator
from math import inf

import torch

from bn_lightning.norms.check import determination, inputs, reference
from bn_lightning.norms.check.findings import Comparison, NotApplicable, describe, norm_property
from bn_lightning.norms.check.kinds import Kind
from bn_lightning.norms.check.subject import TOLERANCES, Norm


@norm_property(
    "results",
    "The layer accepts input of 2, 3, 4 or 5 dimensions.",
    script="""
layer(x)
""",
)
def accepts_input(norm: Norm) -> Iterator[Comparison]:
    for num_dims, error in norm.rejected.items():
        is_failure = num_dims in norm.required or not norm.kinds
        cause = f"With {num_dims} dimensions, the layer raises {describe(error)}"
        yield Comparison(inf if is_failure else 0, 0, cause)
    yield Comparison(0, 0)


@norm_property(
    "results",
    "Output has the shape and dtype of the input, for several batch sizes in a row.",
    advice="Return a tensor with the shape and dtype of the input.",
    script="""
for part in (x[:2], x, torch.cat([x, x])):
    y = layer(part)
    assert (y.shape, y.dtype) == (part.shape, part.dtype), (part.shape, y.shape, y.dtype)
""",
)
def shape_and_dtype(norm: Norm) -> Iterator[Comparison]:
    for dtype in (torch.float32, None):
        for case in norm.cases(dtype=dtype, batch_sizes=(12,)):
            layer = case.layer()
            for positions in (case.shape[2:], [1] * len(case.shape[2:])):
                for size in (2, 12, 4):
                    x = inputs.batch((size, case.shape[1], *positions)).to(case.dtype)
                    uses_batch = case.training or not case.kind.has_running_statistics
                    if uses_batch and case.kind.has_one_value(x):
                        continue
                    y = layer(x)
                    is_right = (y.shape, y.dtype) == (x.shape, x.dtype)
                    cause = (
                        f"The input is {tuple(x.shape)} with {x.dtype}, but the output is "
                        f"{tuple(y.shape)} with {y.dtype}."
                    )
                    yield Comparison(0 if is_right else inf, 0, "" if is_right else cause)


@norm_property(
    "results",
    "The output does not depend on the sizes of earlier batches.",
    advice="The layer keeps a size of an earlier batch, such as the number of values per channel. "
    "Take it from the input of each call.",
    script="""
other = copy.deepcopy(layer)
layer(torch.cat([x, x, x]))
assert_close(layer(x), other(x))
""",
)
def several_batch_sizes(norm: Norm) -> Iterator[Comparison]:
    for case in norm.cases(batch_sizes=(12,)):
        if case.training and case.kind.reads_past:
            continue
        layers = [case.layer(), case.layer()]
        if case.training:
            # The past batches of the other layers have a size, too.
            layers = [case.untrained_layer(), case.untrained_layer()]
        with torch.set_grad_enabled(case.training):
            for size in (2, 4, 14):
                layers[0](inputs.batch((size, *case.shape[1:]), size).to(case.dtype))
            ys = [layer(case.x) for layer in layers]
        yield Comparison(inputs.difference(*ys), case.tolerance)


@norm_property(
    "results",
    "Each group of elements is normalized by its own statistics, with gamma and beta per channel.",
    advice="In each group, the output is an affine function of the input, but it is neither "
    "(x - mean) / sqrt(var + eps) nor x / sqrt(mean of squares + eps), times gamma plus beta. "
    "Compare mean, variance and their axes with a computation by hand.",
    script="""
squares = make()(x).square().mean(STATISTICS)
assert_close(squares, torch.ones_like(squares), rtol=1e-3, atol=1e-3)
""",
)
def normalization(norm: Norm) -> Iterator[Comparison]:
    for kind in norm.kinds.values():
        norm.one_case(kind, 12, training=True)
        if cause := _mixed_channels(kind) or _uneven_positions(kind):
            yield Comparison(inf, 0, cause)
        elif kind.formula == "wrong":
            yield Comparison(inf, 0, kind.cause)
        elif not kind.has_groups and not kind.reads_past and not _has_statistics(norm, kind):
            yield Comparison(
                inf, 0, "The layer does not normalize: it has no statistics of its input."
            )
        elif kind.fit is not None:
            yield Comparison(kind.fit.residual, 10 * TOLERANCES[kind.computes_in] + 1e-4)
    if all(kind.fit is None for kind in norm.kinds.values()):
        raise NotApplicable(_no_formula(norm))


def _has_statistics(norm: Norm, kind: Kind) -> bool:
    layer = norm.build(kind.features, kind.num_dims)
    return any(buffer.is_floating_point() for buffer in layer.buffers())


def _mixed_channels(kind: Kind) -> str:
    """Return the cause if the statistics are taken over samples and all channels."""
    samples, channels, *_ = kind.groups.labels
    is_mixed = len(set(samples)) == len(set(channels)) == 1 and kind.formula != "other"
    return (
        "The statistics are taken over samples and channels. Take them over the samples for each "
        "channel, or over the channels for each sample."
        if is_mixed
        else ""
    )


def _uneven_positions(kind: Kind) -> str:
    """Return the cause if the statistics are taken over some axes of the positions only."""
    axes = range(2, kind.num_dims)
    over = [a for a in axes if len(set(kind.groups.labels[a])) == 1]
    if not over or len(over) == len(axes) or kind.formula == "other":
        return ""
    left = [inputs.axis_name(a, kind.num_dims) for a in axes if a not in over]
    taken = [inputs.axis_name(a, kind.num_dims) for a in over]
    return (
        f"The statistics are taken over {' and '.join(taken)}, but not over {' and '.join(left)}. "
        "Take them over all axes of the positions."
    )


def _no_formula(norm: Norm) -> str:
    if any(kind.formula == "renormalizing" for kind in norm.kinds.values()):
        return "The output in training depends on running statistics (renormalization)."
    return "The layer mixes elements or is nonlinear, like a convolution or an activation."


@norm_property(
    "results",
    "A new layer normalizes without scale and shift.",
    advice="Initialize gamma with 1 and beta with 0, and normalize before they are applied.",
    script="""
squares = make()(x).square().mean(STATISTICS)
assert_close(squares, torch.ones_like(squares), rtol=1e-3, atol=1e-3)
""",
)
def new_layer(norm: Norm) -> Iterator[Comparison]:
    normalizing = [k for k in norm.kinds.values() if k.fit and k.formula != reference.FIXED]
    if not normalizing:
        fixed = all(kind.formula == reference.FIXED for kind in norm.kinds.values())
        raise NotApplicable(
            "The statistics of the layer are fixed." if fixed else _no_formula(norm)
        )
    for kind in normalizing:
        norm.one_case(kind, 12, training=True)
        assert kind.fit is not None
        samples = determination.training_samples(norm.build, kind, is_new=True)
        formula = {kind.fit.name: kind.fit.formula}
        fit = reference.fit(samples, formula, [kind.fit.eps], tolerance=inf)
        error = inputs.largest([(fit.scale - 1).abs().max().item(), fit.shift.abs().max().item()])
        yield Comparison(
            error,
            1e-3,
            f"A new layer multiplies the normalized input by {fit.scale[0]:.3g} and adds "
            f"{fit.shift[0]:.3g} in the first channel. Start with gamma = 1 and beta = 0.",
        )


@norm_property(
    "results",
    "Gamma and beta are used once: the output is an affine function of each parameter.",
    advice="The output is not an affine function of a parameter. It may be applied twice.",
    script="""
p = next(layer.parameters()).data
y = [copy.deepcopy(layer)(x) for _ in range(3) if p.add_(1) is not None]
assert_close(y[2] - y[1], y[1] - y[0])
""",
)
def linear_parameters(norm: Norm) -> Iterator[Comparison]:
    cases = norm.cases(
        training=(True,),
        batch_sizes=(12,),
        only=lambda kind: kind.fit is not None,
        otherwise="The formula of the layer is unknown.",
    )
    for case in cases:
        for name, parameter in case.layer().named_parameters():
            direction = inputs.random(parameter.shape, 80).to(case.dtype)
            ys = []
            for steps in range(3):
                layer = case.layer()
                with torch.no_grad():
                    layer.get_parameter(name).add_(steps * direction)
                ys.append(layer(case.x))
            cause = f"{linear_parameters.advice} The parameter is {name}."
            yield Comparison(
                inputs.difference(ys[2] - ys[1], ys[1] - ys[0]), 10 * case.tolerance, cause
            )
    yield Comparison(0, 0)


@norm_property(
    "results",
    "Equal layers give equal outputs for equal inputs.",
    advice="The output changes from call to call. Remove random numbers and state outside the "
    "layer, such as class attributes and globals.",
    script="""
other = copy.deepcopy(layer)
assert_close(other(x), layer(x), rtol=0, atol=0)
""",
)
def repeatable(norm: Norm) -> Iterator[Comparison]:
    for case in norm.cases():
        yield Comparison(inputs.difference(case.layer()(case.x), case.layer()(case.x)), 0)
