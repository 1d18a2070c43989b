"""Refusal of import paths in checkpoints and in the folders of runs.

Importing them would execute code that a file names.
"""

import contextlib
import importlib.util
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from bn_lightning import lookup
from bn_lightning.errors import UserError
from bn_lightning.runs.experiment import Experiment


def import_paths(experiment: Experiment) -> list[str]:
    """Return the settings whose value may be an import path, such as `model.optimizer`."""
    return [
        *(f"model.{name}" for name in experiment.task.import_paths),
        *(f"data.{name}" for name in experiment.data.import_paths),
    ]


def registered(experiment: Experiment) -> dict[str, str]:
    """Return the prefix of registered names with a dot, by setting."""
    return {f"model.{name}": prefix for name, prefix in experiment.task.registered.items()}


def refuse_untrusted(
    path: str,
    used: Mapping[str, Any],
    chosen: Mapping[str, Any],
    package: str,
    registered: Mapping[str, str],
    flags: Mapping[str, str] | None = None,
) -> None:
    """Refuse import paths that come only from a checkpoint, or from the folder of a run.

    Registered names, settings of the user, defaults of the experiment, and objects that
    are defined in the package of the experiment are trusted.

    Args:
        path: path of the checkpoint or the folder.
        used: the settings of `import_paths` that would be imported, by name.
        chosen: the same settings without the checkpoint: from flags, configs and
            defaults.
        package: top-level package of the experiment.
        registered: see `registered`.
        flags: flags of settings whose flag is not `--SETTING`.

    Raises:
        UserError: an import path is not trusted.
    """
    for name, value in untrusted(used, chosen, package, registered).items():
        flag = (flags or {}).get(name, f"--{name}")
        raise UserError(
            f"{path!r} contains the import path {value!r} as {name.rpartition('.')[2]}. An "
            "import path that only a checkpoint or the folder of a run gives is not imported, "
            "because an import executes code.\n"
            f"If you trust the code, set it on the command line: {flag} {value}"
        )


def untrusted(
    used: Mapping[str, Any],
    chosen: Mapping[str, Any],
    package: str,
    registered: Mapping[str, str],
) -> dict[str, str]:
    """Return the settings in `used` whose import path is not trusted (see `refuse_untrusted`)."""
    return {
        name: value
        for name, value in used.items()
        if isinstance(value, str)
        and "." in value
        and value != chosen.get(name)
        and not (name in registered and value.startswith(registered[name]))
        and not lookup.is_defined_in(value, package)
    }


def refuse_objects(path: str, settings: Mapping[str, Any]) -> None:
    """Refuse settings of a checkpoint from which the parser would create objects.

    In a value of type `Any`, such as an entry of `norm_args`, the parser calls the class
    that `class_path` names.

    Raises:
        UserError: a setting names an object.
    """
    for name, value in settings.items():
        for named in _objects(value):
            raise UserError(
                f"{path!r} contains the object {named!r} in the setting {name}. Settings in a "
                "checkpoint must be plain data, because creating an object executes code.\n"
                "Use a checkpoint that fit has written."
            )


def refuse_untrusted_files(files: Sequence[Path], chosen: Mapping[str, Any], package: str) -> None:
    """Refuse objects, such as callbacks, that only the settings files of a run name.

    The parser imports them. Objects of this package and of Lightning are trusted too.

    Args:
        files: config.yaml and the resumed-N.yaml.
        chosen: the settings without these files.
        package: top-level package of the experiment.

    Raises:
        UserError: an object is not trusted.
    """
    known = set(strings(chosen))
    packages = (package, __package__.partition(".")[0], "lightning")
    for file in files:
        settings = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        for value in _objects(settings):
            is_trusted = any(lookup.is_defined_in(value, trusted) for trusted in packages)
            if value in known or is_trusted or not _is_importable(value):
                continue
            configs = " ".join(f"--config {shlex.quote(str(path))}" for path in files)
            raise UserError(
                f"'{file}' contains the import path {value!r}. An import path that only the folder "
                "of a run gives is not imported, because an import executes code.\n"
                f"If you trust the code, add the settings to the command: {configs}"
            )


def _objects(settings: Any, is_object: bool = False) -> Iterator[str]:
    """Yield the strings that the parser might import: of the trainer, and of any `class_path`."""
    if isinstance(settings, str):
        if is_object and lookup.IMPORT_PATH.fullmatch(settings):
            yield settings
        # The parser reads YAML in strings too.
        with contextlib.suppress(yaml.YAMLError, ValueError):
            value = get_loader("yaml")(settings)
            if isinstance(value, list | dict):
                yield from _objects(value, is_object)
    elif isinstance(settings, list | tuple):
        for value in settings:
            yield from _objects(value, is_object)
    elif isinstance(settings, dict):
        is_object = is_object or "class_path" in settings
        for name, value in settings.items():
            yield from _objects(value, is_object or name == "trainer")


def strings(settings: Any) -> Iterator[str]:
    """Yield the strings in settings, without the names of the settings."""
    if isinstance(settings, str):
        yield settings
    elif isinstance(settings, list | tuple):
        for value in settings:
            yield from strings(value)
    elif isinstance(settings, Mapping):
        yield from strings(list(settings.values()))


def _is_importable(name: str) -> bool:
    """Return whether the top-level package of an import path exists; it is not imported."""
    return importlib.util.find_spec(name.partition(".")[0]) is not None
