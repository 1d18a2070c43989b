"""The section `sweep` in the schema of configs: it accepts what `sweep` accepts."""

import json

import pytest
from jsonschema import Draft202012Validator

from bn_lightning import UserError
from bn_lightning.runs import schema
from bn_lightning.studies import search, sweep

SPACE = {"model.lr": [0.1, 0.2]}
SECTIONS = (
    {"space": SPACE},
    {"space": SPACE, "trials": 5, "sampler": "random", "pruner": "none"},
    {"space": {"model.lr": {"low": 0.01, "high": 1.0, "log": True}}},
    {"space": {"model.lr": {"low": 0.1, "high": 0.5, "step": 0.1}}},
    {"space": {"data.batch_size": {"low": 16, "high": 64, "step": 16}}},
    {"space": {"model.activation": ["relu", "silu"], "model.scheduler": ["StepLR", None]}},
)
MISTAKES = (
    {"space": SPACE, "trails": 5},
    {"space": SPACE, "trials": 0},
    {"space": SPACE, "trials": "many"},
    {"space": SPACE, "sampler": "best"},
    {"space": SPACE, "pruner": "always"},
    {"space": {}},
    {"space": [1]},
    {"space": {"model.lr": 0.1}},
    {"space": {"model.lr": []}},
    {"space": {"model.lr": {"low": 0.1}}},
    {"space": {"model.lr": {"low": 0.1, "high": "a"}}},
    {"space": {"model.lr": {"low": 0.1, "high": 1.0, "lgo": True}}},
)


def is_accepted(section, folder):
    (folder / "sweep.yaml").write_text(json.dumps({"sweep": section}))
    try:
        sweep.parse(["--config", str(folder / "sweep.yaml")])
    except UserError:
        return False
    return True


@pytest.mark.parametrize("section", SECTIONS, ids=str)
def test_a_section_that_is_accepted_is_valid(section, tmp_path):
    assert is_accepted(section, tmp_path)
    Draft202012Validator(schema.SWEEP).validate(section)


@pytest.mark.parametrize("section", MISTAKES, ids=str)
def test_a_mistake_is_refused_by_both(section, tmp_path):
    assert not is_accepted(section, tmp_path)
    assert not Draft202012Validator(schema.SWEEP).is_valid(section)


def test_the_samplers_and_pruners_are_those_of_the_search():
    properties = schema.SWEEP["properties"]
    assert properties["sampler"]["enum"] == list(search.SAMPLERS)
    assert properties["pruner"]["enum"] == list(search.PRUNERS)
