"""The search space of a sweep: reading, sampling and flags."""

import json

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from bn_lightning.errors import UserError
from bn_lightning.studies import space as spaces

SECTION = {
    "model.lr": {"low": 0.05, "high": 1.0, "log": True},
    "model.optimizer_args.momentum": [0.5, 0.9],
    "data.batch_size": {"low": 64, "high": 256, "step": 64},
    "model.activation": ["relu", "gelu"],
}


def test_lists_and_ranges_become_distributions():
    assert spaces.read(SECTION) == {
        "model.lr": FloatDistribution(0.05, 1.0, log=True),
        "model.optimizer_args.momentum": CategoricalDistribution([0.5, 0.9]),
        "data.batch_size": IntDistribution(64, 256, step=64),
        "model.activation": CategoricalDistribution(["relu", "gelu"]),
    }
    # A range of integers needs two integer ends.
    assert spaces.read({"x": {"low": 0, "high": 1.0}}) == {"x": FloatDistribution(0.0, 1.0)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"low": 2.0, "high": 1.0}, "The search space of model.lr is invalid"),
        ([], "The search space of model.lr is invalid"),
        ({"low": "1e-3", "high": 1.0}, "1e-3 as text"),
        ({"low": 0.0, "high": 1.0, "log": True}, "The search space of model.lr is invalid"),
        ({"low": 0.1}, "The search space of model.lr is invalid"),
        ({"low": 0.1, "high": 1.0, "steps": 3}, "steps"),
        (0.5, "The search space of model.lr is invalid: 0.5"),
    ],
)
def test_invalid_spaces_are_refused(values, message):
    with pytest.raises(UserError) as caught:
        spaces.read({"model.lr": values})
    assert message in str(caught.value)


def test_settings_to_check_are_all_values_of_lists_and_the_ends_of_ranges():
    assert spaces.settings_to_check(spaces.read(SECTION)) == [
        {"model.lr": 0.05},
        {"model.lr": 1.0},
        {"model.optimizer_args.momentum": 0.5},
        {"model.optimizer_args.momentum": 0.9},
        {"data.batch_size": 64},
        {"data.batch_size": 256},
        {"model.activation": "relu"},
        {"model.activation": "gelu"},
    ]


def test_flags_parse_to_the_original_values():
    params = {"model.lr": 1e-05, "data.flip": True, "model.norm": "none", "model.scheduler": None}
    flags = spaces.flags(params)
    assert flags[::2] == [f"--{name}" for name in params]
    assert flags[5] == "none"
    assert [json.loads(flags[i]) for i in (1, 3, 7)] == [1e-05, True, None]


def test_suggestions_are_within_the_space():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler())
    for _ in range(20):
        params = spaces.suggest(study.ask(), spaces.read(SECTION))
        assert list(params) == list(SECTION)
        assert 0.05 <= params["model.lr"] <= 1
        assert params["model.optimizer_args.momentum"] in (0.5, 0.9)
        assert params["data.batch_size"] in (64, 128, 192, 256)
        assert params["model.activation"] in ("relu", "gelu")


def refuse_unless(*pairs):
    """Return a function that refuses points whose `a` and `b` are not one of the pairs."""
    tried = []

    def validate(point):
        assert list(point) == ["a", "b", "c"]
        tried.append(point)
        if (point["a"], point["b"]) not in pairs:
            raise UserError(f"{point['a']} does not accept {point['b']}")

    return validate, tried


def test_independent_settings_are_validated_together():
    space = spaces.read({"a": [1, 2, 3], "b": [1, 2], "c": {"low": 0.1, "high": 0.5}})
    validate, tried = refuse_unless(*((a, b) for a in (1, 2, 3) for b in (1, 2)))
    points = spaces.valid_points(space, validate)
    assert len(points) == len(tried) == 3
    for value in spaces.settings_to_check(space):
        assert any(value.items() <= point.items() for point in points)


@pytest.mark.parametrize("pairs", [((1, 1), (2, 2)), ((1, 2), (2, 1)), ((1, 2), (2, 2), (1, 1))])
def test_values_that_are_valid_only_together_are_accepted(pairs):
    space = spaces.read({"a": [1, 2], "b": [1, 2], "c": [1, 2, 3]})
    points = spaces.valid_points(space, refuse_unless(*pairs)[0])
    assert {value for point in points for value in point.items()} == {
        (name, value)
        for name, count in (("a", 2), ("b", 2), ("c", 3))
        for value in range(1, count + 1)
    }


def test_a_value_that_is_never_valid_is_refused_after_a_limited_number_of_tries():
    space = spaces.read({"a": [1, 2], "b": list(range(90)), "c": [1, 2]})
    validate, tried = refuse_unless((1, 1), (1, 2))
    with pytest.raises(UserError, match="2 does not accept"):
        spaces.valid_points(space, validate)
    assert len(tried) < 90 + 2 * spaces.MAX_TRIES
