"""The JSON Schema of the settings: it agrees with the parser, and accepts all configs."""

import dataclasses
import decimal
import enum
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import pytest
import torch
import yaml
from jsonargparse.typing import ClosedUnitInterval, Path_fr, PositiveInt
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from torch import nn

from bn_lightning import UserError, cli
from bn_lightning.runs import completion, schema
from bn_lightning.runs.parser import Parser
from tests.conftest import REPOSITORY, run_here

COMMITTED = REPOSITORY / "configs" / "schema.json"
UPDATE = "update it with: python -m bn_lightning fit --print_schema > configs/schema.json"
CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def parser():
    return completion.parser_of(cli.EXPERIMENT)


@pytest.fixture(scope="module")
def validator(parser):
    return Draft202012Validator(schema.of(parser))


def mistake(validator, text):
    """Return the path and the message of the most relevant error of a config."""
    error = best_match(validator.iter_errors(yaml.safe_load(text)))
    assert error is not None, text
    return error.json_path, error.message


def is_accepted(parser, config):
    """Return whether the parser accepts a config."""
    try:
        parser.parse_string(yaml.safe_dump(config))
    except UserError:
        return False
    return True


# The file


def test_the_committed_schema_is_that_of_the_parser(main):
    _, printed, _ = main("fit", "--print_schema")
    now, committed = json.loads(printed), json.loads(COMMITTED.read_text(encoding="utf-8"))
    assert committed["$comment"].startswith("lightning 2.")
    if now.pop("$comment") != committed.pop("$comment"):
        # Another version of Lightning has other settings of the trainer.
        del now["properties"]["trainer"], committed["properties"]["trainer"]
    assert now == committed, UPDATE


def test_the_schema_is_valid(validator):
    Draft202012Validator.check_schema(validator.schema)
    assert validator.schema["$schema"] == Draft202012Validator.META_SCHEMA["$id"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_config_refers_to_the_schema_and_is_valid(validator, path):
    text = path.read_text(encoding="utf-8")
    first, rest = text.split("\n", 1)
    key, name = first.removeprefix("# yaml-language-server: ").split("=")
    assert key == "$schema" and (path.parent / name) == COMMITTED
    assert rest.startswith("# ")
    validator.validate(yaml.safe_load(text))


def test_the_settings_that_a_run_writes_are_valid(validator, trained):
    settings = yaml.safe_load((trained[0] / "config.yaml").read_text())
    assert settings["trainer"]["max_epochs"] == 2
    validator.validate(settings)


# The flag


def test_print_schema_ignores_configs_and_the_order_of_flags(main, tmp_path):
    (tmp_path / "bad.yaml").write_text("modle: {}\n")
    (tmp_path / "good.yaml").write_text("model: {lr: 0.5}\n")
    printed = set()
    for flags in ([], ["--config", "good.yaml"], ["-c", "bad.yaml"], ["--model.lr", "2"]):
        code, out, err = main("fit", *flags, "--print_schema")
        assert (code, err) == (0, "")
        printed.add(out)
    assert len(printed) == 1
    assert json.loads(out)["properties"]["model"]["properties"]["lr"]["default"] == 1.0
    assert out.isascii()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.yaml", "good.yaml"]


def test_only_fit_has_the_flag(main):
    for command in ("validate", "test"):
        code, out, err = main(command, "--print_schema")
        assert (code, out) == (2, "") and "--print_schema" in err


def test_the_schema_of_another_experiment(tmp_path):
    printed = run_here("fit", "--print_schema", cwd=tmp_path, module="friedman").stdout
    found = Draft202012Validator(json.loads(printed))
    model = found.schema["properties"]["model"]["properties"]
    assert model["width"]["type"] == "integer" and "norm_args" not in model
    assert model["width"]["description"] == "Units of the hidden layer."
    assert found.is_valid({"model": {"width": 3}})
    assert mistake(found, "model: {width: wide}") == (
        "$.model.width",
        "'wide' is not of type 'integer'",
    )


# Mistakes


@pytest.mark.parametrize(
    ("text", "path", "message"),
    [
        ("modle: {lr: 1.0}", "$", "'modle' does not match any"),
        ("model: {learning_rate: 1.0}", "$.model", "'learning_rate' was unexpected"),
        ("data: {seed: 1}", "$.data", "'seed' does not match any"),
        ("model: {lr: fast}", "$.model.lr", "'fast' is not of type 'number'"),
        ("data: {batch_size: 1.5}", "$.data.batch_size", "1.5 is not of type 'integer'"),
        ("data: {flip: 1}", "$.data.flip", "1 is not of type 'boolean'"),
        ("model: {activation: rely}", "$.model.activation", "'rely' is not one of ['sigmoid', "),
        ("model: {norm_args: [1]}", "$.model.norm_args", "[1] is not of type 'object', 'null'"),
        ("trainer: {precision: bf61}", "$.trainer.precision", "'bf61' is not one of"),
        ("threads: -1", "$.threads", "-1 is less than the minimum of 1"),
        ("precise_statistics: -3", "$.precise_statistics", "-3 is less than the minimum of 0"),
        (
            "checkpoint: {every_n_train_steps: -1}",
            "$.checkpoint.every_n_train_steps",
            "-1 is less than the minimum of 0",
        ),
        ("checkpoint: {every: 1}", "$.checkpoint", "'every' was unexpected"),
        (
            "trainer: {callbacks: [Timer, {args: {}}]}",
            "$.trainer.callbacks[1]",
            "'class_path' is a required property",
        ),
        (
            "trainer: {logger: {init_args: {}}}",
            "$.trainer.logger",
            "'class_path' is a required property",
        ),
        (
            "trainer: {max_time: {days: x}}",
            "$.trainer.max_time.days",
            "'x' is not of type 'integer'",
        ),
        ("[1, 2]", "$", "[1, 2] is not of type 'object'"),
    ],
)
def test_a_mistake_has_a_path_and_a_message(validator, text, path, message):
    found, said = mistake(validator, text)
    assert found == path and message in said


@pytest.mark.parametrize(
    "text",
    [
        "model: {norm: my_norms.RMSNorm, norm_args: {eps: 1.0e-3, other: {a: [1]}}}",
        "model: {network: resnet, network_args: {depth: 8}, optimizer: AdamW, scheduler: null}",
        "model: {class_weights: balanced}\ndata: {mirrors: [https://localhost/]}",
        "trainer: {callbacks: [my.Callback, {class_path: my.Other, init_args: {a: 1}}]}",
        "trainer: {callbacks: EarlyStopping, logger: false, strategy: ddp, profiler: null}",
        "trainer: {strategy: {class_path: DDPStrategy, init_args: {timeout: 1}}, plugins: null}",
        "trainer: {logger: [{class_path: CSVLogger}], devices: [0, 1], precision: 16}",
        "trainer: {limit_train_batches: 0.5, limit_val_batches: 3, deterministic: warn}",
        "trainer: {callbacks+: Timer}\ndata: {mirrors+: [https://localhost/]}",
        "model.lr: 0.5\ntrainer.max_epochs: 3",
        "model: settings.yaml\ntrainer:\ndata:",
        "{}",
    ],
)
def test_valid_settings_of_many_kinds(validator, text):
    validator.validate(yaml.safe_load(text))


# Agreement with the parser

VALUES = (
    *(0, -1, 0.5, 2.0, True, None, math.inf, "text", "relu", "3", "true", "[1]"),
    *([], [1], ["a"], {}, {"a": 1}, {"class_path": "Timer"}, [{"class_path": "Timer"}]),
)


def is_lenient(value):
    """Return whether the parser ignores the type of a value: null, and quoted text as in YAML."""
    return value is None or (isinstance(value, str) and yaml.safe_load(value) != value)


def names_objects(details):
    return "class_path" in details.get("properties", {}) or (
        isinstance(details.get("items"), dict) and names_objects(details["items"])
    )


def one_of_each_type(settings):
    types = {}
    for name, details in settings.items():
        words = {word: details[word] for word in details if word not in ("description", "default")}
        if not name.startswith("sweep."):
            types.setdefault(json.dumps(words), name)
    assert len(types) > 20
    return {name: settings[name] for name in types.values()}


def nested(name, value):
    for key in reversed(name.split(".")):
        value = {key: value}
    return value


def test_settings_that_the_parser_accepts_are_valid_and_others_are_not(parser, validator):
    accepted = refused = 0
    settings = dict(completion._settings(validator.schema))
    assert len(settings) > 80
    for name, details in one_of_each_type(settings).items():
        for value in VALUES:
            config = nested(name, value)
            by_parser, by_schema = is_accepted(parser, config), validator.is_valid(config)
            accepted += by_parser
            refused += not by_parser
            if by_parser and not by_schema:
                # The parser reads an empty mapping as no object.
                assert is_lenient(value) or (names_objects(details) and value == {}), config
            if by_schema and not by_parser:
                # 2.0 is an integer in JSON Schema. Classes are not looked up.
                assert value == 2.0 or names_objects(details), config
    assert accepted > 100 and refused > 100


class Color(enum.Enum):
    RED = 1


class Shape(enum.StrEnum):
    ROUND = "round"


@dataclasses.dataclass
class Size:
    height: int = 1


class Point(NamedTuple):
    x: int = 0


class Keys(TypedDict):
    a: int


class Settings:
    """Settings of many types.

    Args:
        color: 100% of a color.
    """

    def __init__(
        self,
        color: Color = Color.RED,
        shape: Shape | None = None,
        size: Size = Size(),  # noqa: B008
        other_size: Size | None = None,
        sizes: list[Size] | None = None,
        point: Point | None = None,
        keys: Keys | None = None,
        file: Path = Path("a"),
        existing: Path_fr | None = None,
        pair: tuple[int, str] = (1, "a"),
        numbers: Sequence[float] = (),
        table: dict[str, list[int]] | None = None,
        names: set[str] | None = None,
        function: Callable[[int], int] | None = None,
        kind: type[nn.Module] = nn.ReLU,
        layer: nn.Module | None = None,
        layers: list[nn.Module] | None = None,
        block: nn.Sequential | None = None,
        fraction: ClosedUnitInterval | None = None,
        count: PositiveInt | float = 1.5,
        mixed: Literal[1, "a"] | bool = 1,
        price: decimal.Decimal | None = None,
        anything: Any = None,
        untyped=None,
        device: torch.device | str = "cpu",
    ):
        pass


OF_TYPES = {
    "color": (["RED"], ["BLUE", 3]),
    "shape": (["ROUND"], ["SQUARE"]),
    "size": ([{"height": 3}], [{"height": "x"}, {"width": 3}]),
    "other_size": ([{"height": 3}], []),
    "sizes": ([[{"height": 3}]], [3]),
    "point": ([{"x": 3}], []),
    "keys": ([{"a": 1}], []),
    "file": (["a/b"], [3, ["a"]]),
    "existing": (["a.txt"], [3]),
    "pair": ([[2, "b"]], [3, {"a": 1}]),
    "numbers": ([[1, 0.5]], [["a"], 0.5]),
    "table": ([{"a": [1]}], [{"a": 1}, [1]]),
    "names": ([["a"]], [3, [1]]),
    "function": (["math.sqrt"], []),
    "kind": (["torch.nn.Sigmoid"], [3]),
    "layer": (["torch.nn.ReLU", {"class_path": "torch.nn.ReLU"}], [3, {"class": "x"}]),
    "layers": ([["torch.nn.ReLU"], [{"class_path": "torch.nn.ReLU"}]], [3, [3]]),
    "block": ([{"class_path": "torch.nn.Sequential"}], [3, [3]]),
    "fraction": ([0, 0.5, 1], [-0.1, 1.1, "a"]),
    "count": ([1, 0.5, -0.5], ["a", [1]]),
    "mixed": ([1, "a", False], ["b", [1]]),
    "price": ([0.5, 3], []),
    "anything": ([1, "a", [1], {"a": [None]}], []),
    "untyped": ([1, "a", [1]], []),
    "device": (["cpu"], [3]),
}


def test_settings_of_other_types(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").touch()
    parser = Parser()
    parser.add_class_arguments(Settings, "model")
    found = schema.of(parser)
    Draft202012Validator.check_schema(found)
    validator = Draft202012Validator(found)
    model = found["properties"]["model"]["properties"]
    assert OF_TYPES.keys() == model.keys()
    assert model["color"]["description"] == "100% of a color."
    for name, (right, wrong) in OF_TYPES.items():
        for value in right:
            config = {"model": {name: value}}
            assert is_accepted(parser, config), config
            assert validator.is_valid(config), config
        for value in wrong:
            config = {"model": {name: value}}
            assert not is_accepted(parser, config), config
            assert not validator.is_valid(config), config
