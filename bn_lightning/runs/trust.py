"""Code that only a checkpoint names is not executed: a file's word is not enough to run code."""

from collections.abc import Mapping
from typing import Any

from bn_lightning import lookup
from bn_lightning.errors import UserError
from bn_lightning.runs.experiment import Experiment


def import_paths(experiment: Experiment) -> list[str]:
    """Return the settings whose value may be an import path, such as `model.optimizer`."""
    return [
        *(f"model.{name}" for name in experiment.task.import_paths),
        *(f"data.{name}" for name in experiment.data.import_paths),
    ]


def refuse_untrusted(
    path: str,
    used: Mapping[str, Any],
    chosen: Mapping[str, Any],
    package: str,
    flags: Mapping[str, str] | None = None,
) -> None:
    """Refuse import paths that come from a checkpoint alone.

    Trusted are registered names, what the user or the defaults of the experiment have chosen, and
    objects that the package of the experiment defines.

    Args:
        path: of the checkpoint.
        used: settings that would be imported, by name; those of `import_paths` matter.
        chosen: the same settings without the checkpoint: typed, in a config, or a default.
        package: the top-level package of the experiment.
        flags: the flag by which a setting is chosen, where it is not `--SETTING`.

    Raises:
        UserError: an import path that is not trusted.
    """
    for name, value in used.items():
        if not isinstance(value, str) or "." not in value or value == chosen.get(name):
            continue
        if lookup.is_defined_in(value, package):
            continue
        flag = (flags or {}).get(name, f"--{name}")
        raise UserError(
            f"{path!r} asks for the {name.rpartition('.')[2]} {value!r}, an import path. A file's "
            "word is not enough to run code.\n"
            f"If you trust it, name it yourself: {flag} {value}"
        )
