"""Refusal of import paths in checkpoints: importing them would execute code that a file names."""

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
    """Refuse import paths that come only from a checkpoint.

    Registered names, settings of the user, defaults of the experiment, and objects that
    are defined in the package of the experiment are trusted.

    Args:
        path: path of the checkpoint.
        used: the settings of `import_paths` that would be imported, by name.
        chosen: the same settings without the checkpoint: from flags, configs and
            defaults.
        package: top-level package of the experiment.
        flags: flags of settings whose flag is not `--SETTING`.

    Raises:
        UserError: an import path is not trusted.
    """
    for name, value in used.items():
        if not isinstance(value, str) or "." not in value or value == chosen.get(name):
            continue
        if lookup.is_defined_in(value, package):
            continue
        flag = (flags or {}).get(name, f"--{name}")
        raise UserError(
            f"{path!r} contains the import path {value!r} as {name.rpartition('.')[2]}. An "
            "import path that only a checkpoint gives is not imported, because an import executes "
            "code.\n"
            f"If you trust the code, set it on the command line: {flag} {value}"
        )
