"""Settings as plain data, for config.yaml.

Some classes of Lightning have defaults that YAML cannot represent, such as a
`torch.device`. Such a default is left out, and applies again when the file is read.
"""

import warnings
from enum import Enum
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

# jsonargparse writes this text, and a warning, instead of a value that it cannot
# represent. It also does so for the string `l1_unstructured` of a `Callable | str`.
_NOT_WRITTEN = "Unable to serialize instance "


def of(parser: ArgumentParser, settings: Namespace) -> dict[str, Any]:
    """Return settings as plain data, from which `parser` reads the same settings."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", rf"\s*{_NOT_WRITTEN}")
        text = parser.dump(_without_enums(settings), skip_unset=False)
    return dict(_corrected(yaml.safe_load(text), settings))


def _without_enums(value: Any) -> Any:
    """Return a copy in which members of string enumerations are strings."""
    if isinstance(value, Namespace):
        plain = {name: _without_enums(inner) for name, inner in vars(value).items()}
        return Namespace(plain)  # type: ignore[no-untyped-call]
    if isinstance(value, list):
        return [_without_enums(inner) for inner in value]
    return value.value if isinstance(value, Enum) and isinstance(value, str) else value


def _corrected(written: Any, value: Any) -> Any:
    """Return what was written for `value`, with strings and without values that are not plain."""
    if isinstance(written, dict):
        inner = vars(value) if isinstance(value, Namespace) else value
        return {
            name: _corrected(written[name], inner.get(name))
            for name in written
            if isinstance(inner.get(name), str) or not _is_missing(written[name])
        }
    if isinstance(written, list) and isinstance(value, list):
        return [_corrected(*pair) for pair in zip(written, value, strict=True)]
    return str(value) if _is_missing(written) else written


def _is_missing(written: Any) -> bool:
    return isinstance(written, str) and written.startswith(_NOT_WRITTEN)
