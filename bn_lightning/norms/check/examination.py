"""The examination of a norm: its kinds, then each property."""

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from bn_lightning.errors import UserError
from bn_lightning.norms import registry
from bn_lightning.norms.check import acceptance, determination, findings, inputs
from bn_lightning.norms.check.findings import Finding, Property
from bn_lightning.norms.check.subject import Builder, Norm


def properties() -> list[Property]:
    """Return all properties in the order of the table: of the modules, and in each module."""
    # `processes` imports Lightning, which would slow down --help.
    from bn_lightning.norms.check import (
        deployment,
        derivatives,
        edges,
        identity,
        measurements,
        memory,
        modes,
        precision,
        processes,
        results,
        running,
        state,
    )

    modules: list[ModuleType] = [results, edges, modes, running, derivatives, memory, precision]
    modules += [state, deployment, processes, identity, measurements]
    return [v for module in modules for v in vars(module).values() if isinstance(v, Property)]


def choose(names: Collection[str] | None) -> list[Property]:
    """Return the properties with these names, or all, in the order of the table.

    Raises:
        UserError: a name is unknown.
    """
    return properties() if names is None else findings.choose(properties(), names)


@dataclass
class Examination:
    """A norm whose kinds are known.

    Attributes:
        norm: the norm. It has no kinds if it raises for every input.
        is_identical: compare it with PyTorch's batch normalization, whatever kind it is. By
            default, only batch normalization is compared.
        names: the names of the properties to examine, or None for all.
    """

    norm: Norm
    is_identical: bool = False
    names: Collection[str] | None = None

    def properties(self) -> list[Property]:
        """Return the properties to examine."""
        known = choose(self.names)
        if self.names is not None:
            return known
        is_batch_norm = any(kind.is_batch_norm for kind in self.norm.kinds.values())
        compares = self.is_identical or is_batch_norm
        return [p for p in known if compares or p.section != "identity"]

    def run(self) -> Iterator[Finding]:
        """Examine each property. If the norm accepts no input, that is the only finding."""
        chosen = self.properties()
        if not self.norm.kinds:
            chosen = [p for p in properties() if p.name == "accepts_input"]
        for found in chosen:
            with torch.random.fork_rng(devices=()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.manual_seed(0)
                finding = found.examine(self.norm)
            yield finding

    def passed(self, found: Iterable[Finding]) -> bool:
        """Return whether everything holds, and, if `is_identical`, everything is the same.

        Then each identity must have been compared, except that of the state dict.
        """
        for finding in found:
            if finding.verdict == "FAIL":
                return False
            if self.is_identical and finding.section == "identity":
                is_missing = finding.verdict == "n/a" and finding.name != "state_dict_of_pytorch"
                if finding.verdict == "DIFFERS" or is_missing:
                    return False
        return True


def prepare(
    norm: Callable[..., nn.Module],
    name: str,
    *,
    num_dims: Collection[int] | None = None,
    norm_args: dict[str, Any] | None = None,
) -> Norm:
    """Build a norm, and determine its kinds.

    Args:
        norm, num_dims, norm_args: see `examine`.
        name: the name of the norm for messages.

    Raises:
        UserError: the norm cannot be called or built, is not a normalization layer, or
            `num_dims` has a number other than 2 to 5.
    """
    registry.refuse_other_calls(norm, name)
    wrong = [d for d in num_dims or () if d not in inputs.POSITIONS]
    if wrong:
        raise UserError(f"num_dims is {wrong[0]}; it must be one of 2, 3, 4 and 5.")
    build = Builder(norm, name, norm_args or {})
    required = num_dims or ()
    subject = Norm(build, {}, {}, frozenset(required))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _find_kinds(subject, required or inputs.POSITIONS)
    if not subject.kinds:
        _refuse_no_norm(subject)
    return subject


def _find_kinds(subject: Norm, num_dims: Iterable[int]) -> None:
    for d in num_dims:
        try:
            kind = acceptance.accepted(subject.build, d)
        except Exception as error:
            subject.rejected[d] = error
            if isinstance(error, acceptance.ShapeError):
                subject.required |= {d}
            continue
        try:
            subject.kinds[d] = determination.determine(subject.build, kind)
        except Exception as error:
            subject.rejected[d], subject.required = error, subject.required | {d}


def _refuse_no_norm(norm: Norm) -> None:
    """Raise a UserError if no layer can be built, or if its output has another shape."""
    for error in norm.rejected.values():
        if isinstance(error, acceptance.NotANorm):
            raise UserError(f"{norm.build.name!r} is not a normalization layer: {error}")
    errors: list[Exception] = []
    for num_dims in norm.rejected:
        try:
            norm.build(6, num_dims)
            return
        except Exception as error:
            errors.append(error)
    if isinstance(errors[0], UserError):
        raise errors[0]
    raise UserError(
        f"{norm.build.name!r} cannot be built: {findings.describe(errors[0])}\n"
        "A norm is a class or function called as norm(num_features=6, num_dims=4), which returns "
        "a torch.nn.Module."
    )


def examine(
    norm: Callable[..., nn.Module],
    *,
    identical: bool = False,
    names: Collection[str] | None = None,
    num_dims: Collection[int] | None = None,
    norm_args: dict[str, Any] | None = None,
) -> Iterator[Finding]:
    """Examine a norm, which takes about 20 seconds, and yield the finding for each property.

    Args:
        norm: a class or function, called as norm(num_features=..., num_dims=...).
        identical: see `Examination.is_identical`.
        names: the names of the properties. The default is all.
        num_dims: the numbers of dimensions. In each, the norm must accept input. The
            default is those from 2 to 5 in which it does.
        norm_args: further arguments of the norm.

    Raises:
        UserError: see `prepare`; or a name is unknown.
    """
    name = getattr(norm, "__qualname__", str(norm))
    subject = prepare(norm, name, num_dims=num_dims, norm_args=norm_args)
    yield from Examination(subject, identical, names).run()
