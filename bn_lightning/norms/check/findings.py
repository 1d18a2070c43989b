"""Properties of norm layers, and the findings of their examination: the lines of the table."""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from bn_lightning import lookup
from bn_lightning.errors import UserError, describe_error

if TYPE_CHECKING:
    from bn_lightning.norms.check.subject import Case, Norm

SECTIONS = {
    "results": "Results",
    "modes": "Training and evaluation",
    "running": "Running statistics and arguments",
    "derivatives": "Derivatives",
    "input": "Input and precision",
    "state": "State",
    "deployment": "Compilation, deployment, several processes",
    "identity": "Identity with torch.nn.BatchNorm",
    "measured": "Measurements, as a ratio to torch.nn.BatchNorm",
}
BAD = ("FAIL", "DIFFERS")


class NotApplicable(Exception):
    """The property does not apply to this layer, or cannot be examined on this machine."""


@dataclass(frozen=True)
class Comparison:
    """The difference between what a layer does and what it should do, in one case.

    Attributes:
        difference: relative to the largest expected value, see `inputs.difference`. NaN
            never passes.
        tolerance: the largest difference that is accepted.
        cause: the cause of a larger difference. "" stands for the property's advice.
    """

    difference: float
    tolerance: float
    cause: str = ""

    @property
    def is_good(self) -> bool:
        return self.difference <= self.tolerance  # False for NaN


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        section: a key of `SECTIONS`.
        name: the name of the property.
        verdict: `pass` or `FAIL`; `same` or `DIFFERS` in the section `identity`;
            `measured`; or `n/a` if the property does not apply.
        difference: the largest difference found, or, if one is too large, the first such
            difference. For a measurement, the ratio to PyTorch's layer.
        note: the cause of a difference, or the reason for `n/a`.
        case: the smallest examined input that shows a failure.
    """

    section: str
    name: str
    verdict: str
    difference: float | None = None
    note: str = ""
    case: "Case | None" = field(default=None, compare=False)


@dataclass(frozen=True)
class Property:
    """A function that examines one property of a norm.

    Attributes:
        section, name: see `Finding`.
        question: what holds, in one line.
        advice: what to do if it does not hold.
        script: statements that raise an error if the property does not hold. They can
            use `torch`, `copy`, the layer as `layer`, an input `x`, and `assert_close`.
        compare: yields the comparisons. An exception of the layer is a failure.
    """

    section: str
    name: str
    question: str
    advice: str
    script: str
    compare: Callable[["Norm"], Iterator[Comparison]]

    def examine(self, norm: "Norm") -> Finding:
        """Examine a norm, up to the first comparison that is not good."""
        good, bad = {"identity": ("same", "DIFFERS"), "measured": ("measured", "measured")}.get(
            self.section, ("pass", "FAIL")
        )
        worst = Comparison(-1.0, math.inf)
        norm.case = None
        try:
            for comparison in self.compare(norm):
                if not comparison.is_good:
                    cause = comparison.cause or self.advice
                    if comparison.difference != comparison.difference:
                        # The advice is for numbers that differ.
                        cause = "The result is NaN."
                    return self._finding(bad, comparison.difference, cause, norm.case)
                worst = max(worst, comparison, key=lambda c: c.difference)
        except NotApplicable as reason:
            return self._finding("n/a", None, str(reason), None)
        except Exception as error:
            return self._finding(bad, None, describe(error), norm.case)
        if worst.difference < 0:
            return self._finding("n/a", None, "No input was examined.", None)
        note = worst.cause if self.section == "measured" else ""
        return self._finding(good, worst.difference, note, None)

    def _finding(
        self, verdict: str, difference: float | None, note: str, case: "Case | None"
    ) -> Finding:
        return Finding(self.section, self.name, verdict, difference, note, case)


def describe(error: Exception) -> str:
    """Return an error of a layer in one line, and the lines of the user's code that led to it."""
    lines = lookup.users_lines(error)
    return describe_error(error) + "".join(f"\n{line}" for line in lines[-3:])


def norm_property(
    section: str, question: str, *, advice: str = "", script: str = ""
) -> Callable[[Callable[["Norm"], Iterator[Comparison]]], Property]:
    """Return a decorator that turns a function into a `Property` of the function's name."""
    assert section in SECTIONS

    def decorate(compare: Callable[["Norm"], Iterator[Comparison]]) -> Property:
        return Property(section, compare.__name__, question, advice, script, compare)

    return decorate


# The decorators of `identity` and of `measurements`.
batch_norm_identity = partial(norm_property, "identity")
measurement = partial(norm_property, "measured")


def choose(properties: list[Property], names: Collection[str]) -> list[Property]:
    """Return the properties with these names, in the order of the table.

    Raises:
        UserError: a name is unknown.
    """
    known = {p.name: p for p in properties}
    for name in names:
        if name not in known:
            raise UserError(
                f"Unknown property {name!r}.{lookup.did_you_mean(name, list(known))}\n"
                "`check --list` prints the names of all properties."
            )
    return [p for p in properties if p.name in names]
