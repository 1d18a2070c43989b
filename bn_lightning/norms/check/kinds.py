"""The kind of a norm: what it does with its input, whatever its parts are called."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bn_lightning.norms.check import inputs, reference
from bn_lightning.norms.check.reference import Groups


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

    def groups_of(self, x: Tensor) -> Groups:
        """Return the groups of an input of any size."""
        samples, channels, *positions = self.groups.labels
        of_positions = [
            tuple(range(size)) if len(set(labels)) > 1 else (0,) * size
            for size, labels in zip(x.shape[2:], positions, strict=True)
        ]
        return Groups((samples[: len(x)], channels, *of_positions))

    def has_one_value(self, x: Tensor) -> bool:
        """Return whether a group of x has one value: its variance is 0, or 0 / 0 if unbiased."""
        return bool((self.groups_of(x).moments(x.double())[2] == 1).any())

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
        positions = [inputs.axis_name(a, self.num_dims) for a in range(2, self.num_dims)]
        if len(positions) > 1 and each[-len(positions) :] == positions:
            each[-len(positions) :] = ["position"]
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
