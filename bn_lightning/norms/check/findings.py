"""Checks of a norm, and their findings: the lines of the table."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from bn_lightning.errors import describe_error

# make(num_dims) builds a new layer. See `probes.make_layer`.
Make = Callable[..., nn.Module]
# The largest difference, and its cause, or "" if the cause is unknown.
Answer = tuple[float, str]

SECTIONS = {
    "property": "Properties that every norm should have",
    "identity": "Identity with torch.nn.BatchNorm (other kinds of norms should differ)",
    "measured": "Measurements, as a ratio to torch.nn.BatchNorm",
}
GOOD = {"property": "pass", "identity": "same", "measured": "measured"}
BAD = {"property": "FAIL", "identity": "DIFFERS", "measured": "measured"}


@dataclass
class Finding:
    """One line of the table.

    Attributes:
        section: a key of `SECTIONS`.
        question: the property or value that was checked.
        verdict: `pass` or `FAIL` for a property, `same` or `DIFFERS` for an identity,
            `measured` for a measurement, or `n/a` if the check does not apply.
        difference: the largest difference found. For a measurement, the ratio to
            PyTorch's layer.
        note: the cause of a difference, or the reason for `n/a`.
    """

    section: str
    question: str
    verdict: str
    difference: float | None
    note: str


class NotApplicable(Exception):
    """The check does not apply to this layer, or cannot run on this machine."""


@dataclass
class Check:
    """A function that checks a norm, with its tolerance.

    Attributes:
        section, question: see `Finding`.
        tolerance: the largest difference that is accepted.
        advice: the note if the tolerance is exceeded and `answer` returns no cause.
        answer: the function.
    """

    section: str
    question: str
    tolerance: float
    advice: str
    answer: Callable[[Make], Answer]

    def __call__(self, make: Make) -> Finding:
        """Check the layers that `make` builds. An exception of a layer is a finding, too."""
        try:
            difference, note = self.answer(make)
        except NotApplicable as reason:
            return Finding(self.section, self.question, "n/a", None, str(reason))
        except Exception as error:
            verdict, note = BAD[self.section], describe_error(error)
            return Finding(self.section, self.question, verdict, None, note)
        is_good = difference <= self.tolerance  # False for NaN
        verdict = (GOOD if is_good else BAD)[self.section]
        note = note or ("" if is_good else self.advice)
        return Finding(self.section, self.question, verdict, difference, note)


def _check(
    section: str, question: str, tolerance: float = float("inf"), advice: str = ""
) -> Callable[[Callable[[Make], Answer]], Check]:
    """Return a decorator that turns a function into a `Check`."""
    return partial(Check, section, question, tolerance, advice)


# The decorators used in `properties` and `processes`, in `identity`, and in
# `measurements`.
norm_property = partial(_check, "property")
batch_norm_identity = partial(_check, "identity")
measurement = partial(_check, "measured")
