"""The properties of `check` as pytest cases for a normalization layer."""

from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any

import pytest
from torch import nn

from bn_lightning.errors import UserError
from bn_lightning.norms.check import command, examination, findings
from bn_lightning.norms.check.examination import Examination
from bn_lightning.norms.check.findings import Finding, Property
from bn_lightning.norms.check.subject import Norm


def norm_checks(
    norm: Callable[..., nn.Module],
    *,
    identical: bool = False,
    known_failures: Mapping[str, str] | None = None,
    num_dims: Collection[int] | None = None,
    norm_args: dict[str, Any] | None = None,
) -> pytest.MarkDecorator:
    """Return a decorator that runs a test once for each property of `check`.

        @norm_checks(MyNorm, known_failures={"second_derivative": "not implemented"})
        def test_my_norm(check):
            check()

    The id of each case is the name of the property, as `check --list` prints it. A property
    that does not apply to the norm is skipped. As with scikit-learn's
    `parametrize_with_checks`, known failures are expected failures.

    Args:
        norm: a class or function, called as norm(num_features=..., num_dims=...). It must
            be at the top level of a module to be examined with several processes.
        identical: also require the results of PyTorch's batch normalization.
        known_failures: maps names of properties to reasons. Such a case is an expected
            failure, and fails if the property holds.
        num_dims: the numbers of dimensions, 2 to 5, that the norm must accept. The default
            is those that it accepts.
        norm_args: further arguments of the norm.

    Raises:
        UserError: a name in `known_failures` is unknown.
    """
    chosen = [
        found
        for found in examination.properties()
        if found.section != "measured" and (identical or found.section != "identity")
    ]
    known_failures = known_failures or {}
    findings.choose(chosen, list(known_failures))

    @cache
    def prepare() -> Examination:
        name = getattr(norm, "__qualname__", str(norm))
        prepared = examination.prepare(norm, name, num_dims=num_dims, norm_args=norm_args)
        return Examination(prepared, identical)

    return pytest.mark.parametrize(
        "check",
        [
            pytest.param(
                NormCheck(found, prepare, known_failures.get(found.name)),
                id=found.name,
                marks=(
                    pytest.mark.xfail(reason=known_failures[found.name], strict=True)
                    if found.name in known_failures
                    else ()
                ),
            )
            for found in chosen
        ],
    )


class NormCheck:
    """One property of one norm. Calling it skips, passes or fails the running test."""

    def __init__(
        self, found: Property, prepare: Callable[[], Examination], known_failure: str | None
    ) -> None:
        self.found, self.prepare, self.known_failure = found, prepare, known_failure

    def __call__(self) -> None:
        __tracebackhide__ = True
        try:
            prepared = self.prepare()
        except UserError as error:
            pytest.fail(str(error), pytrace=False)
        finding = self._examine(prepared.norm)
        if not prepared.passed([finding]):
            pytest.fail(f"{self.found.question}\n{command.line(finding)}", pytrace=False)
        if finding.verdict == "n/a":
            if self.known_failure is not None:
                pytest.xfail(self.known_failure)
            pytest.skip(finding.note)

    def _examine(self, norm: Norm) -> Finding:
        if not norm.kinds and self.found.name != "accepts_input":
            return Finding(
                self.found.section, self.found.name, "n/a", None, "No input is accepted."
            )
        return self.found.examine(norm)
