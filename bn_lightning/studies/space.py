"""The search space of a sweep: read from a config, sampled by Optuna, passed on as flags."""

import json
from collections.abc import Mapping
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
