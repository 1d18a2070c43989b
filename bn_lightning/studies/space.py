"""The search space of a sweep: read from a config, sampled by Optuna, passed on as flags."""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import Trial

from bn_lightning.errors import UserError

# The distribution of each searched setting.
Space = dict[str, BaseDistribution]
# A value for each searched setting.
Point = dict[str, Any]

# How many points are tried to find a valid one with a given value.
MAX_TRIES = 30


def read(section: Mapping[str, Any]) -> Space:
    """Return the search space of a config.

    Raises:
        UserError: the values of a setting are neither a list nor a range.
    """
    return {name: _distribution(name, values) for name, values in section.items()}


def _distribution(name: str, values: Any) -> BaseDistribution:
    error: Exception | None = None
    try:
        if isinstance(values, list):
            return CategoricalDistribution(values)
        options = dict(values)
        ends = options.pop("low"), options.pop("high")
        if all(isinstance(end, int) for end in ends):
            return IntDistribution(*ends, **options)
        if all(isinstance(end, int | float) for end in ends):
            return FloatDistribution(*ends, **options)
    except (ValueError, TypeError, KeyError) as caught:
        error = caught
    reason = f" ({error})" if error else ""
    raise UserError(
        f"The search space of {name} is invalid: {values}{reason}\n"
        "Give a list of values, or a range such as {low: 0.01, high: 1.0}.\n"
        "A range may also have `log: true` or `step: 0.1`. "
        "If both ends are integers, only integers are tried.\n"
        "YAML reads 1e-3 as text; write 1.0e-3."
    ) from error


def suggest(trial: Trial, space: Space) -> dict[str, Any]:
    """Return a value for each setting, chosen by the sampler of the trial."""
    return {name: _suggest(trial, name, distribution) for name, distribution in space.items()}


def _suggest(trial: Trial, name: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    low, high, log = distribution.low, distribution.high, distribution.log
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(name, int(low), int(high), step=distribution.step, log=log)
    return trial.suggest_float(name, low, high, step=distribution.step, log=log)


def valid_points(space: Space, validate: Callable[[Point], None]) -> list[Point]:
    """Return valid points that together contain each value of `settings_to_check`.

    A point has a value for each searched setting, as a trial does: a value may be valid
    only together with certain values of other settings.

    Args:
        validate: raises a UserError if a point is invalid.

    Raises:
        UserError: for a value, none of `MAX_TRIES` points was valid.
    """
    wanted = settings_to_check(space)
    values = {name: [one[name] for one in wanted if name in one] for name in space}
    tried: dict[str, UserError | None] = {}
    valid: list[Point] = []

    def error_of(point: Point) -> UserError | None:
        key = repr(point)
        if key not in tried:
            try:
                validate(point)
                tried[key] = None
                valid.append(point)
            except UserError as error:
                tried[key] = error
        return tried[key]

    # The values of different settings are checked together, to build few networks.
    for number in range(max(map(len, values.values()))):
        error_of({name: found[number % len(found)] for name, found in values.items()})
    for value in wanted:
        if any(value.items() <= point.items() for point in valid):
            continue
        candidates = itertools.islice(_candidates(value, values, list(valid)), MAX_TRIES)
        first = None
        for point in candidates:
            error = error_of(point)
            if error is None:
                break
            first = first or error
        else:
            assert first is not None
            raise first
    return valid


def _candidates(
    value: Point, values: Mapping[str, Sequence[Any]], valid: Sequence[Point]
) -> Iterator[Point]:
    """Yield points with the given value, those that differ least from valid points first."""
    for point in valid:
        yield {**point, **value}
    for point in valid:
        for name, found in values.items():
            yield from ({**point, name: other, **value} for other in found)
    for combination in itertools.product(*values.values()):
        yield {**dict(zip(values, combination, strict=True)), **value}


def settings_to_check(space: Space) -> list[dict[str, Any]]:
    """Return the settings to validate: each value of a list, and both ends of a range."""
    found: list[dict[str, Any]] = []
    for name, distribution in space.items():
        if isinstance(distribution, CategoricalDistribution):
            found += [{name: value} for value in distribution.choices]
        else:
            assert isinstance(distribution, IntDistribution | FloatDistribution)
            found += [{name: distribution.low}, {name: distribution.high}]
    return found


def flags(params: Mapping[str, Any]) -> list[str]:
    """Return settings as command-line flags of `fit`."""
    found = []
    for name, value in params.items():
        found += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return found
