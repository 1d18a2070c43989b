"""A JSON Schema of the settings of `fit`, with which editors complete and check configs.

The schema accepts every config that `fit` accepts, apart from values of which the parser
ignores the type: a number in quotes, or null for a setting that has no null. It refuses
unknown settings and wrong types. A value of a type that is not known here is not checked.

jsonargparse 4.52 and later have a generator of their own. It is not used because it lists
the classes that are imported when it runs: a callback of a user would be refused, and the
schema would change with each import. It also fails on the classes of Lightning 2.6.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from jsonargparse import typing as restricted

from bn_lightning.runs.parser import Parser, description

DIALECT = "https://json-schema.org/draft/2020-12/schema"

Schema = dict[str, Any]

SIMPLE: Mapping[Any, Schema] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    NoneType: {"type": "null"},
    timedelta: {"type": "string"},
    restricted.PositiveInt: {"type": "integer", "minimum": 1},
    restricted.NonNegativeInt: {"type": "integer", "minimum": 0},
    restricted.PositiveFloat: {"type": "number", "exclusiveMinimum": 0},
    restricted.NonNegativeFloat: {"type": "number", "minimum": 0},
    restricted.ClosedUnitInterval: {"type": "number", "minimum": 0, "maximum": 1},
    restricted.OpenUnitInterval: {
        "type": "number",
        "exclusiveMinimum": 0,
        "exclusiveMaximum": 1,
    },
}

# An object, such as a callback: its import path, or the path with arguments.
OBJECT: Schema = {
    "type": ["string", "object"],
    "properties": {
        "class_path": {
            "type": "string",
            "description": "Import path of the class. A class of Lightning needs only its name.",
        },
        "init_args": {"type": "object", "description": "Arguments of the class."},
        "dict_kwargs": {
            "type": "object",
            "description": "Arguments that the signature of the class does not name.",
        },
    },
    "required": ["class_path"],
    "additionalProperties": False,
}

# A config of `sweep` has this section in addition. `studies.sweep` reads it.
SWEEP: Schema = {
    "type": "object",
    "description": "Search of the command `sweep`; `fit` does not accept it.",
    "properties": {
        "trials": {
            "type": "integer",
            "minimum": 1,
            "default": 30,
            "description": "Total number of trials.",
        },
        "sampler": {
            "enum": ["tpe", "random"],
            "default": "tpe",
            "description": "Method that chooses the settings of each trial.",
        },
        "pruner": {
            "enum": ["asha", "none"],
            "default": "asha",
            "description": "Method that ends poor trials early.",
        },
        "space": {
            "type": "object",
            "description": "Values of each searched setting, for example of `model.lr`: a list, "
            "or a range such as {low: 0.01, high: 1.0, log: true}.",
            "minProperties": 1,
            "additionalProperties": {
                "type": ["array", "object"],
                "minItems": 1,
                "properties": {
                    "low": {"type": "number"},
                    "high": {"type": "number"},
                    "step": {"type": ["number", "null"]},
                    "log": {"type": "boolean"},
                },
                "required": ["low", "high"],
                "additionalProperties": False,
            },
        },
    },
    "additionalProperties": False,
}


class PrintSchema(argparse._HelpAction):
    """The flag that prints the schema of the parser's settings and exits."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> NoReturn:
        assert isinstance(parser, Parser)
        # JSON escapes characters that the encoding of a redirected output may not have.
        print(json.dumps(of(parser), indent=2))
        parser.exit()


def of(parser: Parser) -> Schema:
    """Return the schema of the parser's settings, and of the section of `sweep`.

    The settings `trainer` are those of the installed version of Lightning, which the
    schema names as its `$comment`.
    """
    schema: Schema = {
        "$schema": DIALECT,
        "$comment": f"lightning {version('lightning')}",
        "title": "Settings of fit",
        **_object(),
        # A setting may also be a key of its own, such as `model.lr`.
        "patternProperties": {"[.]": {}},
    }
    titles = {name: group.title for name, group in (parser.groups or {}).items()}
    for action in parser._actions:
        *groups, name = action.dest.split(".")
        if isinstance(action.default, str) and action.default == argparse.SUPPRESS:
            # A flag without a value, a setting that another one determines, or a group.
            if action.dest in titles and action.option_strings:
                _add_group(schema, groups, name, f"{titles[action.dest]}.")
        elif hasattr(action, "_typehint"):
            _add_setting(_find(schema, groups), name, action)
    schema["properties"]["sweep"] = SWEEP
    return schema


def _object() -> Schema:
    return {"type": "object", "properties": {}, "additionalProperties": False}


def _find(schema: Schema, groups: Iterable[str]) -> Schema:
    """Return the schema of nested groups, which are created if they are missing."""
    for name in groups:
        schema = schema["properties"].setdefault(name, _object())
    return schema


def _add_group(schema: Schema, groups: Iterable[str], name: str, text: str) -> None:
    # A group may also be the path of a file, or empty.
    group = _object() | {"type": ["object", "string", "null"], "description": text}
    _find(schema, groups)["properties"][name] = group


def _add_setting(group: Schema, name: str, action: argparse.Action) -> None:
    setting = dict(_of_type(action._typehint))  # type: ignore[attr-defined]
    if text := description(action):
        setting["description"] = text
    if isinstance(action.default, str | int | float | bool):
        setting["default"] = action.default
    group["properties"][name] = setting
    if any(option.endswith("+") for option in action.option_strings):
        # This key adds values to a list of another config.
        group.setdefault("patternProperties", {})[f"^{name}[+]$"] = {}


def _of_type(kind: Any) -> Schema:
    """Return the schema of a type. It is empty, and accepts any value, if nothing is known."""
    if kind in SIMPLE:
        return SIMPLE[kind]
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return _any_of([_of_type(argument) for argument in arguments])
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is Callable:
        return OBJECT
    if not isinstance(origin, type) or _has_fields(origin):
        return {}
    if issubclass(origin, Enum):
        return {"enum": list(origin.__members__)}
    if issubclass(origin, Mapping):
        return {"type": "object"} | _with("additionalProperties", arguments[1:])
    if origin in (list, set) or origin.__module__ == "collections.abc":
        return {"type": "array"} | _with("items", arguments)
    if issubclass(origin, tuple):
        return {"type": "array"}
    if issubclass(origin, Path | type):
        return {"type": "string"}
    for base in (int, float, str):
        if issubclass(origin, base):
            return SIMPLE[base]
    if origin.__module__.partition(".")[0] in sys.stdlib_module_names:
        return {}
    return OBJECT


def _with(keyword: str, kinds: Sequence[Any]) -> Schema:
    """Return the keyword for values of the first type, if there is one and it is known."""
    values = _of_type(kinds[0]) if kinds else {}
    return {keyword: values} if values else {}


def _has_fields(kind: type) -> bool:
    """Return whether a value is a mapping of fields instead of `class_path` and `init_args`."""
    marks = ("_fields", "__total__", "__attrs_attrs__", "__pydantic_fields__")
    return dataclasses.is_dataclass(kind) or any(hasattr(kind, mark) for mark in marks)


def _any_of(choices: Sequence[Schema]) -> Schema:
    """Return a schema that accepts what any of the choices accepts.

    If possible, it is one schema with several types: its errors name the wrong key, and
    those of `anyOf` only say that no choice fits. A keyword such as `items` affects only
    values of one type.
    """
    if {} in choices:
        return {}
    values = [value for choice in choices for value in choice.get("enum", [])]
    others = [choice for choice in choices if "enum" not in choice]
    if values and others in ([], [SIMPLE[NoneType]]):
        return {"enum": values + [None] * len(others)}
    numbers = [choice for choice in choices if choice.get("type") in ("integer", "number")]
    if len(numbers) > 1 and any(len(number) > 1 for number in numbers):
        # The range of one must not limit the other.
        return {"anyOf": list(choices)}
    merged: Schema = {"type": []}
    for choice in choices:
        keywords = choice.keys() - {"type"}
        if "enum" in choice or any(
            merged.get(word, choice[word]) != choice[word] for word in keywords
        ):
            return {"anyOf": list(choices)}
        types = choice["type"] if isinstance(choice["type"], list) else [choice["type"]]
        merged = choice | merged
        merged["type"] += [kind for kind in types if kind not in merged["type"]]
    return merged
