"""Checks and their findings: what is asked about a norm, and the answer as a line of the table."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

Make = Callable[..., nn.Module]  # Make(num_dims) builds a fresh layer; see `probes.make_layer`.
Answer = tuple[float, str]  # The largest difference, and its cause where that is known.

SECTIONS = {
    "property": "Properties, which any norm should have",
    "identity": "Identity with torch.nn.BatchNorm, which a norm of another kind should not have",
    "measured": "Measured, as a ratio to torch.nn.BatchNorm",
}
GOOD = {"property": "pass", "identity": "same", "measured": "measured"}
BAD = {"property": "FAIL", "identity": "DIFFERS", "measured": "measured"}


@dataclass
class Finding:
    """One line of the table.

    The verdict of a `property` is `pass` or `FAIL`. That of an `identity` is `same` or `DIFFERS`; a
    norm of another kind than batch normalization should differ. The difference of a `measured` line
    is a ratio to torch's layer. Any verdict may be `n/a`, with the reason as the note.
    """

    section: str
    question: str
    verdict: str
    difference: float | None
    note: str


class NotApplicable(Exception):
    """The question does not arise for this layer, or cannot be answered on this machine."""


@dataclass
class Check:
    """A question about a norm, and the function that answers it."""

    section: str
    question: str
    tolerance: float
    advice: str
    answer: Callable[[Make], Answer]

    def __call__(self, make: Make) -> Finding:
        """Answer the question for the layers that `make` builds. An exception is a finding too."""
        try:
            difference, note = self.answer(make)
        except NotApplicable as reason:
            return Finding(self.section, self.question, "n/a", None, str(reason))
        except Exception as error:
            lines = str(error).strip().splitlines()
            said = f"{type(error).__name__}: {lines[0] if lines else ''}"
            return Finding(self.section, self.question, BAD[self.section], None, said)
        is_good = difference <= self.tolerance  # False for NaN
        verdict = (GOOD if is_good else BAD)[self.section]
        note = note or ("" if is_good else self.advice)
        return Finding(self.section, self.question, verdict, difference, note)


def _check(
    section: str, question: str, tolerance: float = float("inf"), advice: str = ""
) -> Callable[[Callable[[Make], Answer]], Check]:
    """Make a check of the function below: it is good up to a difference of `tolerance`.

    `advice` is printed if it is not and the function names no cause.
    """
    return partial(Check, section, question, tolerance, advice)


# The decorators of the modules `properties` and `processes`, `identity`, and `measurements`.
norm_property = partial(_check, "property")
batch_norm_identity = partial(_check, "identity")
measurement = partial(_check, "measured")
