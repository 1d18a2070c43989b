"""The settings that all runs of a study share."""

import shlex

from bn_lightning.studies import shared_settings, study

EXPERIMENT = "bn_lightning.experiment:EXPERIMENT"


def test_defaults_of_fit_and_of_the_study_are_left_out():
    settings = {"monitor": False, "trainer.devices": "1", "trainer.limit_test_batches": 0}
    settings |= {"model.width": 8, "model.lr": 0.1}
    defaults = {"monitor": True, "trainer.devices": "auto", "trainer.limit_test_batches": None}
    defaults |= {"model.width": 32, "model.lr": 0.1}
    own = (*study.DEFAULTS, "--trainer.limit_test_batches", "0")
    found = shared_settings.non_defaults([settings], defaults, own)
    assert found == {"model.width": 8}
    settings |= {"monitor": True, "trainer.limit_test_batches": 5}
    found = shared_settings.non_defaults([settings], defaults, own)
    assert found == {"model.width": 8, "trainer.limit_test_batches": 5}


def test_settings_that_differ_between_runs_are_left_out():
    runs = [{"a": 1, "b": 1, "c": 1}, {"a": 1, "b": 2}]
    assert shared_settings.non_defaults(runs, {}, ()) == {"a": 1}


def test_the_line_of_settings_can_be_given_to_fit():
    chosen = {
        "model.network": "resnet",
        "model.network_args": {"depth": 8, "width": 4},
        "model.norm_args": {"eps": 0.001},
        "data.mirrors": ["https://a b", "c"],
        "data.flip": True,
        "data.resize": 32,
    }
    line = shared_settings.describe(chosen)
    assert line.startswith("all runs: --model.network resnet --model.network_args.depth 8 ")
    flags = shlex.split(line.removeprefix("all runs: "))
    settings = study.read_settings(EXPERIMENT, flags)
    assert {name: settings[name] for name in chosen} == chosen
    assert shared_settings.describe({}) == ""
