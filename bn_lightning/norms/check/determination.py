"""Determination of the kind of a norm from what its layers do.

Names of classes, parameters and buffers play no role. Changed inputs show on which
elements an output depends; fits of the outputs show the formula.
"""

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bn_lightning.norms.check import inputs, reference
from bn_lightning.norms.check.kinds import Kind
from bn_lightning.norms.check.reference import CORRECT, WRONG, Groups, Sample
from bn_lightning.norms.check.subject import TOLERANCES, Builder, Case

# A batch that contains several virtual batches of ghost batch normalization.
LARGE_BATCH = 140
# The number of batches after which the warm-up of batch renormalization has an effect.
LONG_PAST = 200
USUAL_EPS = (1e-5, 1e-6, 1e-3, 1e-8, 1e-12, 0.0)


def determine(build: Builder, kind: Kind) -> Kind:
    """Return the kind of a norm.

    Args:
        kind: see `accepted`.
    """
    kind = replace(kind, state_is_fixed=not _changes_in_training(build, kind))
    if not kind.state_is_fixed:
        kind = replace(
            kind,
            has_running_statistics=_depends_on_past(_case(build, kind, 10, training=False)),
            reads_past=_depends_on_past(_case(build, kind, 10, training=True)),
        )
    kind = replace(kind, computes_in=_precision(_case(build, kind, 10, training=True)))
    case = _case(build, kind, LARGE_BATCH, training=True)
    kind = replace(kind, groups=groups(case))
    if kind.reads_past and not kind.has_groups:
        # Elements depend on each other through running statistics only.
        kind = replace(kind, groups=Groups.of_channels(case.shape))
    return replace(kind, **_formula(build, kind))


def _changes_in_training(build: Builder, kind: Kind) -> bool:
    """Return whether training changes the state, or the output of evaluation."""
    case = _case(build, kind, 10, training=True)
    layer = case.new_layer()
    outputs, states = [], []
    for _ in range(2):
        states.append([b.clone() for b in layer.buffers()])
        outputs.append(layer.eval()(case.x))
        layer.train()(case.x)
    return inputs.difference(*outputs) != 0 or inputs.difference(*states) != 0


def _depends_on_past(case: Case) -> bool:
    """Return whether the output of a layer depends on the batches that it was trained with."""
    x, outputs = case.x, []
    for past, repetitions in ((1, 0), (2, 0), (1, LONG_PAST)):
        layer = case.layer(past).train()
        for _ in range(repetitions):
            layer(x)
        # Some layers take evaluation for training if gradients are computed.
        with torch.set_grad_enabled(case.training):
            outputs.append(layer.train(case.training)(x))
    return not inputs.difference(outputs[1:], [outputs[0]] * 2) <= case.tolerance


def _precision(case: Case) -> torch.dtype:
    """Return the dtype in which a layer computes, from the noise of its output.

    Along a line, the sixth differences of a smooth function at small distances are 0, up
    to rounding.
    """
    direction = inputs.random(case.shape, 77).to(case.dtype)
    ys = torch.stack([case.layer()(case.x + 1e-4 * k * direction).detach() for k in range(7)])
    noise = ys.double().diff(n=6, dim=0).flatten(1).square().mean().sqrt() / 924**0.5
    noise = float(noise / ys.abs().max().clamp(min=1))
    if noise < 1e-12:
        return torch.float64
    return torch.float32 if noise < 3e-6 else torch.bfloat16


def groups(case: Case) -> Groups:
    """Return the groups of elements that share statistics, from how outputs follow inputs.

    If the values of two elements are normalized together, a change of the one changes the
    output of the other, or, with renormalization, the gradient.
    """
    return Groups(tuple(_labels(case, axis) for axis in range(len(case.shape))))


def _labels(case: Case, axis: int) -> tuple[int, ...]:
    x, size = case.x, case.shape[axis]
    y = case.layer()(x).detach()
    labels = [-1] * size
    for index in range(size):
        if labels[index] >= 0:
            continue
        related = _changed(case, x, y, axis, index)
        if case.kind.reads_past and len(related) == 1:
            related |= _related_by_gradient(case, x, axis, index)
        label = max(labels) + 1
        for i in related:
            labels[i] = label
        if index == 1 and axis == 0 and max(labels) == 1 and labels.count(0) == 1:
            # The first two samples stand for themselves, and so do all others.
            return tuple(range(size))
    return tuple(labels)


def _changed(case: Case, x: Tensor, y: Tensor, axis: int, index: int) -> set[int]:
    """Return the indices of an axis whose outputs change with the input at one index."""
    moved = x.clone()
    part = moved.select(axis, index)
    part.copy_(1.7 * part + inputs.random(part.shape, 31).to(x.dtype))
    other = case.layer()(moved).detach()
    changes = (other - y).abs().transpose(0, axis).flatten(1).amax(1)
    # Not `> tolerance`, so that NaN counts as a change.
    return {index, *(i for i, c in enumerate(changes.tolist()) if not c <= 1e-6)}


def _related_by_gradient(case: Case, x: Tensor, axis: int, index: int) -> set[int]:
    leaf = x.clone().requires_grad_()
    y = case.layer()(leaf).select(axis, index)
    (gradient,) = torch.autograd.grad(y, leaf, inputs.random(y.shape, 32).to(y.dtype))
    sizes = gradient.abs().transpose(0, axis).flatten(1).amax(1)
    return {i for i, s in enumerate(sizes.tolist()) if not s <= 1e-9}


def _formula(build: Builder, kind: Kind) -> dict[str, Any]:
    """Return the fields formula, fit and cause of a kind."""
    if kind.reads_past:
        return {"formula": "renormalizing"}
    samples = training_samples(build, kind)
    tolerance = 10 * TOLERANCES[kind.computes_in]
    candidates = eps_candidates(build, kind)
    names = [reference.FIXED]
    if kind.has_groups:
        names = [reference.CENTRING, reference.ROOT_MEAN_SQUARE, reference.LIMITED]
    correct = {name: CORRECT[name] for name in names}
    found = reference.fit(samples, correct, candidates, tolerance)
    # A search for eps finds it less exactly than a setting states it.
    if found.residual <= (tolerance if found.eps in candidates else max(tolerance, 1e-4)):
        return {"formula": found.name, "fit": found}
    if not reference.is_affine_in_each_cell(samples, kind.has_groups):
        return {"formula": "other"}
    wrong = reference.fit(samples, WRONG, candidates, tolerance)
    is_known = wrong.residual <= max(tolerance, 1e-4) or (
        "float16" in wrong.name and (wrong.residual < min(1e-3, found.residual / 20))
    )
    return {"formula": "wrong", "cause": wrong.name if is_known else ""}


def training_samples(build: Builder, kind: Kind, is_new: bool = False) -> list[Sample]:
    """Return inputs, groups and outputs of one layer in training, for batches of several sizes.

    The deviations range from far below sqrt(eps) to far above.
    """
    layer = None
    samples = []
    for size, scale in ((12, 1.0), (4, 0.03), (14, 0.003), (6, 3e-4), (10, 30.0)):
        case = _case(build, kind, size, training=True)
        if layer is None:
            layer = case.new_layer() if is_new else case.layer()
        x = inputs.batch(case.shape, size, scale).to(kind.dtype)
        y = layer(x).detach()
        samples.append((x.double(), groups(case), y.double()))
    return samples


def eps_candidates(build: Builder, kind: Kind) -> list[float]:
    """Return the small numbers among a layer's attributes and defaults, and usual values of eps."""
    layer = build(kind.features, kind.num_dims)
    values: list[Any] = [value for module in layer.modules() for value in vars(module).values()]
    values += [p.default for p in inspect.signature(build.norm).parameters.values()]
    values += build.norm_args.values()
    small = [v for v in values if isinstance(v, float) and 0 <= v < 1]
    return list(dict.fromkeys([*small, *USUAL_EPS]))


def _case(build: Builder, kind: Kind, size: int, training: bool) -> Case:
    shape = (size, kind.features, *inputs.POSITIONS[kind.num_dims])
    return Case(build, kind, shape, training, kind.dtype)
