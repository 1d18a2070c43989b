"""The kind of a norm, which is determined by what its layers do.

Names of classes, parameters and buffers play no role. Other inputs show on which
elements an output depends; fits of the outputs show the formula.
"""

import inspect
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bn_lightning.errors import describe_error
from bn_lightning.norms.check import inputs, reference
from bn_lightning.norms.check.reference import CORRECT, WRONG, Groups, Sample
from bn_lightning.norms.check.subject import TOLERANCES, Builder, Case

# The numbers of channels to try. Group normalization needs a multiple of its groups.
FEATURES = (6, 8, 12, 16, 32, 64, 96, 128, 256)
# A batch that contains several virtual batches of ghost batch normalization.
LARGE_BATCH = 140
# The number of batches after which the warm-up of batch renormalization has an effect.
LONG_PAST = 200
USUAL_EPS = (1e-5, 1e-6, 1e-3, 1e-8, 1e-12, 0.0)


@dataclass(frozen=True)
class Kind:
    """What a norm does with input of `num_dims` dimensions.

    Attributes:
        features: the number of channels in the examination.
        dtype: float64, or float32 if the layer rejects float64.
        computes_in: the dtype in which a float64 layer computes.
        state_is_fixed: training does not change the state.
        has_running_statistics: the output in evaluation depends on earlier batches.
        reads_past: the output in training depends on earlier batches.
        groups: the groups of elements of a large batch that share statistics in training.
        formula: the name of the formula: a key of `CORRECT`; `wrong` for a layer that only
            shifts and scales its input, but as no formula does; `other` for one that mixes
            elements or is nonlinear; `renormalizing` if `reads_past`.
        fit: the formula with its values. None for the last three.
        cause: of a wrong formula.
    """

    num_dims: int
    features: int
    dtype: torch.dtype = torch.float64
    computes_in: torch.dtype = torch.float64
    state_is_fixed: bool = False
    has_running_statistics: bool = False
    reads_past: bool = False
    groups: Groups = field(default_factory=lambda: Groups(()))
    formula: str = ""
    fit: reference.Fit | None = None
    cause: str = ""

    @property
    def is_per_sample(self) -> bool:
        """Return whether, in training, each sample is normalized on its own."""
        labels = self.groups.labels[0]
        return len(set(labels)) == len(labels)

    @property
    def added_eps(self) -> float:
        """Return the number that is added to the variance."""
        if self.fit is None:
            return 1e-5
        return 0.0 if self.fit.name == reference.LIMITED else self.fit.eps

    @property
    def has_groups(self) -> bool:
        """Return whether elements share statistics at all."""
        return any(len(set(labels)) < len(labels) for labels in self.groups.labels)

    @property
    def is_affine(self) -> bool:
        """Return whether the layer only shifts and scales its input."""
        return self.formula != "other"

    @property
    def samples_of_a_group(self) -> int:
        return self.groups.labels[0].count(self.groups.labels[0][0])

    @property
    def normalizes_batch_in_evaluation(self) -> bool:
        """Return whether the layer keeps no state, and normalizes each batch by its own."""
        _, channels, *_ = self.groups.labels
        is_per_channel = len(set(channels)) == len(channels)
        return self.state_is_fixed and self.has_groups and not self.is_per_sample and is_per_channel

    @property
    def is_batch_norm(self) -> bool:
        """Return whether the statistics are those of a channel over all samples and positions."""
        _, channels, *_ = self.groups.labels
        is_over = [len(set(labels)) == 1 for labels in self.groups.labels]
        is_over[1] = len(set(channels)) == len(channels)
        return all(is_over) and self.formula == reference.CENTRING

    def __str__(self) -> str:
        if self.formula == reference.FIXED:
            return "fixed scale and shift for each channel"
        over, each = [], []
        for axis, labels in enumerate(self.groups.labels):
            name, number = inputs.axis_name(axis, self.num_dims), len(set(labels))
            if number == 1:
                over.append(name)
            elif number == len(labels):
                each.append(
                    {"samples": "sample", "positions": "position"}.get(name, name.rstrip("s"))
                )
            elif axis == 0:
                over.append(f"virtual batches of {labels.count(labels[0])} samples")
            else:
                over.append(f"{number} groups of {name}")
        past = "with" if self.has_running_statistics else "without"
        text = f"statistics over {', '.join(over) or 'nothing'}"
        text += f" for each {' and '.join(each)}" if each else ""
        return f"{text}; {FORMULAS.get(self.formula, self.formula)}; {past} running statistics"


FORMULAS = {
    reference.ROOT_MEAN_SQUARE: "not centring (root mean square)",
    reference.LIMITED: "centring, with a variance of at least eps",
    "renormalizing": "corrected by running statistics in training (renormalization)",
    "other": "with other operations, such as a convolution or an activation",
    "wrong": "unknown formula",
}


class NotANorm(Exception):
    """The output of a layer is no tensor with the shape of its input."""


class ShapeError(Exception):
    """A layer accepts inputs only if some of their sizes are equal."""


def determine(build: Builder, kind: Kind) -> Kind:
    """Return the kind of a norm.

    Args:
        kind: see `accepted`.
    """
    kind = replace(kind, state_is_fixed=not _changes_in_training(build, kind))
    if not kind.state_is_fixed:
        kind = replace(
            kind,
            has_running_statistics=_depends_on_past(_case(build, kind, 7, training=False)),
            reads_past=_depends_on_past(_case(build, kind, 7, training=True)),
        )
    kind = replace(kind, computes_in=_precision(_case(build, kind, 7, training=True)))
    case = _case(build, kind, LARGE_BATCH, training=True)
    kind = replace(kind, groups=groups(case))
    if kind.reads_past and not kind.has_groups:
        # Elements depend on each other through running statistics only.
        samples, channels, *positions = ((0,) * size for size in case.shape)
        channels = tuple(range(len(channels)))
        kind = replace(kind, groups=Groups((samples, channels, *positions)))
    return replace(kind, **_formula(build, kind))


def _case(build: Builder, kind: Kind, size: int, training: bool) -> Case:
    shape = (size, kind.features, *inputs.POSITIONS[kind.num_dims])
    return Case(build, kind, shape, training, kind.dtype)


def accepted(build: Builder, num_dims: int) -> Kind:
    """Return a kind with the first number of channels and dtype that the norm accepts.

    Raises:
        NotANorm: the output has another shape than the input.
        ShapeError: the norm accepts only inputs whose positions have certain sizes.
        Exception: that of the layer, if it raises for every input.
    """
    first_error: Exception | None = None
    for dtype in (torch.float64, torch.float32):
        for features in FEATURES:
            kind = Kind(num_dims, features, dtype, state_is_fixed=True)
            error = _error(build, kind, inputs.POSITIONS[num_dims])
            if error is None:
                return kind
            first_error = first_error or error
    assert first_error is not None
    if num_dims > 2:
        _refuse_special_sizes(build, num_dims, first_error)
    raise first_error


def _error(build: Builder, kind: Kind, positions: tuple[int, ...]) -> Exception | None:
    """Return the error of a layer in both modes, or None if one of them accepts the input.

    Raises:
        NotANorm: the output has another shape than the input.
    """
    error: Exception | None = None
    for training in (True, False):
        case = Case(build, kind, (7, kind.features, *positions), training, kind.dtype)
        try:
            y = case.new_layer()(case.x)
        except Exception as raised:
            error = error or raised
            continue
        if not isinstance(y, Tensor) or y.shape != case.shape:
            found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise NotANorm(f"for input of shape {case.shape}, it returns {found}.")
        return None
    return error


def _refuse_special_sizes(build: Builder, num_dims: int, error: Exception) -> None:
    """Raise a ShapeError if the norm accepts square inputs, or as many positions as channels.

    A layer for the last dimension, such as a norm of transformers, accepts inputs whose last
    size is the number of channels. That is no error: it treats dimension 1 as it treats the
    samples or the other positions.
    """
    kind = Kind(num_dims, FEATURES[0], state_is_fixed=True)
    usual = inputs.POSITIONS[num_dims]
    special = [(5,) * len(usual), (*usual[:-1], kind.features)]
    for positions in special:
        if _error(build, kind, positions) is not None:
            continue
        case = Case(build, kind, (7, kind.features, *positions), True, kind.dtype)
        samples, channels, *others = groups(case).labels
        pattern = others[0] if num_dims > 3 else samples
        is_for_last_dimension = (len(set(channels)) > 1) == (len(set(pattern)) > 1)
        if positions[-1] != kind.features or not is_for_last_dimension:
            shapes = [(7, kind.features, *sizes) for sizes in (positions, usual)]
            raise ShapeError(
                f"{describe_error(error)} for input of shape {shapes[1]}, but accepts {shapes[0]}. "
                "Check the order of the axes: sizes that happen to be equal hide a wrong one."
            )


def _changes_in_training(build: Builder, kind: Kind) -> bool:
    """Return whether training changes the state, or the output of evaluation."""
    case = _case(build, kind, 7, training=True)
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


def groups_of(kind: Kind, x: Tensor) -> Groups:
    """Return the groups of an input of any size, from those of the large batch."""
    samples, channels, *positions = kind.groups.labels
    sizes = x.shape[2:]
    return Groups(
        (
            samples[: len(x)],
            channels,
            *(
                (tuple(range(size)) if len(set(labels)) > 1 else (0,) * size)
                for labels, size in zip(positions, sizes, strict=True)
            ),
        )
    )


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
    for size, scale in ((9, 1.0), (4, 0.03), (13, 0.003), (6, 3e-4), (5, 30.0)):
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
