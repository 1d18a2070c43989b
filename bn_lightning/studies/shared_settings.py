"""The settings that all runs of a study share."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from bn_lightning.runs import folder


def non_defaults(
    settings: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any], own: Sequence[str]
) -> dict[str, Any]:
    """Return the settings that all runs share and that differ from the defaults.

    Args:
        settings: the settings of each run.
        defaults: the default settings of `fit`.
        own: the default flags of the study.
    """
    flags = dict(zip(own[::2], own[1::2], strict=True))
    return {
        name: value
        for name, value in settings[0].items()
        if all(other.get(name) == value for other in settings)
        and value != defaults.get(name)
        and str(value).lower() != flags.get(f"--{name}")
    }


def describe(settings: Mapping[str, Any]) -> str:
    """Return the settings that all runs share as a line of flags; "" if there are none."""
    flags = [
        f"--{name} {shlex.quote(value if isinstance(value, str) else json.dumps(value))}"
        for name, value in folder.flat(dict(settings)).items()
    ]
    return f"all runs: {' '.join(flags)}\n" if flags else ""
