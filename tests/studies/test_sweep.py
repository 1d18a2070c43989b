"""`sweep` end to end on the sample: trials, best config and invalid options."""

import csv
from pathlib import Path

import pytest
import yaml
from PIL import Image

from bn_lightning.errors import UserError
from bn_lightning.studies import sweep
from tests.conftest import run_here

CONFIG = """\
data: {source: sample}
trainer: {max_epochs: 2, limit_train_batches: 6, accelerator: cpu}
model: {optimizer_args: {nesterov: true, momentum: 0.5}}
sweep:
  trials: 4
  sampler: random
  space:
    model.lr: {low: 0.05, high: 1.0, log: true}
    model.optimizer_args.momentum: [0.5, 0.9]
    data.batch_size: {low: 64, high: 256, step: 64}
"""

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

EXPERIMENT = "bn_lightning.experiment:EXPERIMENT"
ARGUMENTS = ("sweep", "--config", "sweep.yaml", "--jobs", "2")


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The folder of a sweep on the sample, and its output. No test may change it."""
    cwd = tmp_path_factory.mktemp("swept")
    (cwd / "sweep.yaml").write_text(CONFIG)
    return cwd, run_here(*ARGUMENTS, cwd=cwd).stdout


def trials_of(cwd):
    return list(csv.DictReader((cwd / "runs/sweep/trials.csv").open()))


def test_trials_are_within_the_space_and_never_use_the_test_set(swept):
    trials = trials_of(swept[0])
    assert len(trials) == 4
    for trial in trials:
        settings = yaml.safe_load((swept[0] / trial["folder"] / "config.yaml").read_text())
        result = yaml.safe_load((swept[0] / trial["folder"] / "result.json").read_text())
        assert result["test_acc"] is None and result["finished"]
        lr, batch_size = settings["model"]["lr"], settings["data"]["batch_size"]
        assert 0.05 <= lr <= 1 and batch_size in (64, 128, 192, 256)
        assert lr == float(trial["model.lr"]) and batch_size == int(trial["data.batch_size"])
        momentum = float(trial["model.optimizer_args.momentum"])
        assert settings["model"]["optimizer_args"] == {"nesterov": True, "momentum": momentum}
        if trial["state"] == "finished":
            assert float(trial["val_acc"]) == result["val_acc"]
    for name in ("history", "importance"):
        with Image.open(swept[0] / f"runs/sweep/{name}.png") as picture:
            assert len(picture.convert("L").getcolors(256)) > 20


def test_the_best_config_can_be_trained(swept, main):
    finished = [trial for trial in trials_of(swept[0]) if trial["state"] == "finished"]
    best = max(finished, key=lambda trial: float(trial["val_acc"]))
    winner = swept[0] / "runs/sweep/winner.yaml"
    assert "sweep" not in yaml.safe_load(winner.read_text())
    code, _, err = main("fit", "--config", winner, "--data.source", "sample")
    assert code == 0, err
    result = yaml.safe_load(Path("runs/sweep-winner/0/result.json").read_text())
    # The number of threads may differ, and with it the rounding.
    assert result["val_acc"] == pytest.approx(float(best["val_acc"]), abs=0.02)
    assert result["test_acc"] > 0.1


def test_a_finished_sweep_trains_nothing_and_prints_the_same_report(swept):
    again = run_here(*ARGUMENTS, cwd=swept[0]).stdout
    assert again == "".join(line for line in swept[1].splitlines(True) if not line.startswith("["))
    assert len(list((swept[0] / "runs/sweep").glob("trial-*"))) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.lr": {"low": 0.05, "high": 2.0, "log": True}}, "--sweep.space was"),
        ({"model.lr": {"low": 2.0, "high": 1.0}}, "space of model.lr is invalid"),
        ({"model.lr": []}, "space of model.lr is invalid"),
        ({"model.lr": {"low": "1e-3", "high": 1.0}}, "1e-3 as text"),
        ({"model.lr": {"low": 0.0, "high": 1.0, "log": True}}, "space of model.lr is invalid"),
        ({"data.val_images": [0, 5000]}, "No validation samples are held out"),
        ({"model.lrr": [1]}, "Did you mean"),
        (
            {"model.norm": ["custom", "layers"]},
            "norm layers, momentum 0.5 cannot be trained:\nUnknown norm 'layers'",
        ),
        ({}, "No search space is given"),
    ],
)
def test_other_or_invalid_spaces_are_refused(swept, main, monkeypatch, change, message):
    monkeypatch.chdir(swept[0])
    config = yaml.safe_load(CONFIG)
    config["sweep"]["space"] = config["sweep"]["space"] | change if change else {}
    Path("other.yaml").write_text(yaml.safe_dump(config))
    code, _, err = main("sweep", "--config", "other.yaml")
    assert code == 2 and message in err and len(err.splitlines()) < 25, err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model.lr", "0.5"), "--model.lr was 1.0 and is now 0.5"),
        (("--trainer.limit_val_batches", "0"), "No validation samples are held out"),
        (("--data.val_images", "0"), "No validation samples are held out"),
        (("--sampler", "grid"), "invalid choice: 'grid'"),
        (("--trials", "0"), "trials is 0"),
        (("--config", "nowhere.yaml"), "nowhere.yaml"),
        (("--storage", "mydb"), "The storage of the study cannot be used"),
        (("--storage", "sqlite:///other.db"), "contains the runs of another study"),
        (
            ("--storage", "postgresql://nobody:secret@127.0.0.1:1/none"),
            "The storage of the study cannot be used",
        ),
    ],
)
def test_mistakes_are_reported_before_any_trial(swept, main, monkeypatch, arguments, message):
    monkeypatch.chdir(swept[0])
    code, _, err = main(*ARGUMENTS, *arguments)
    assert code == 2 and message in err and len(err.splitlines()) < 25, err
    assert "secret" not in err
    assert ("WARNING: The password in --storage is visible" in err) == ("secret" in str(arguments))


def test_trials_with_a_non_finite_loss_count_as_failed(main):
    config = {
        "data": {"source": "sample"},
        "model": {"norm": "none", "activation": "relu"},
        "trainer": {"max_epochs": 1, "limit_train_batches": 5, "accelerator": "cpu"},
        "sweep": {"trials": 3, "sampler": "random", "space": {"model.lr": [1e30]}},
    }
    Path("sweep.yaml").write_text(yaml.safe_dump(config))
    code, out, err = main("sweep", "--config", "sweep.yaml")
    assert code == 0, err
    assert out.count("FAILED: non-finite loss at step") == 3
    assert "3 trials: 0 finished, 0 ended early, 3 failed" in out
    assert "there is no best trial" in out
    again = main("sweep", "--config", "sweep.yaml")[1]
    assert "FAILED" not in again and "3 failed" in again


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Target and region quantiles")
def test_networks_are_searched_and_the_shared_network_is_shown(main, tmp_path):
    (tmp_path / "swept_network.py").write_text("from bn_lightning.networks.mlp import MLP\n")
    common = ("--data.source", "sample", "--trainer.max_steps", "2")
    common += ("--trainer.val_check_interval", "2", "--trainer.accelerator", "cpu")
    for name, shared, space in (
        ("a", {}, {"model.network": ["mlp", "swept_network.MLP"]}),
        (
            "b",
            {"network": "resnet", "network_args": {"width": 4}},
            {"model.network_args.depth": [8]},
        ),
    ):
        section = {"trials": 2, "sampler": "random", "pruner": "none", "space": space}
        Path("sweep.yaml").write_text(yaml.safe_dump({"model": shared, "sweep": section}))
        code, out, err = main("sweep", "--config", "sweep.yaml", "--name", name, *common)
        assert code == 0, err
        assert "2 trials: 2 finished" in out
    [line] = [line for line in out.splitlines() if line.startswith("all runs: ")]
    assert line.endswith("--model.network resnet --model.network_args.width 4")
    trials = list(csv.DictReader((tmp_path / "runs/a/trials.csv").open()))
    for trial in trials:
        settings = yaml.safe_load((tmp_path / trial["folder"] / "config.yaml").read_text())
        assert settings["model"]["network"] == trial["model.network"]
    winner = yaml.safe_load((tmp_path / "runs/b/winner.yaml").read_text())
    assert winner["model"] == {"network": "resnet", "network_args": {"width": 4, "depth": 8}}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Target and region quantiles")
def test_trials_of_other_code_are_reported_and_trained_again_on_request(main, tmp_path):
    layer = tmp_path / "swept_norm.py"
    layer.write_text("from torch import nn\n\n\ndef norm(**_):\n    return nn.Identity()\n")
    config = {
        "data": {"source": "sample"},
        "trainer": {"max_epochs": 1, "limit_train_batches": 2, "accelerator": "cpu"},
        "sweep": {"trials": 2, "sampler": "random", "pruner": "none"},
    }
    config["sweep"]["space"] = {
        "model.lr": {"low": 0.1, "high": 0.2},
        "model.norm": ["swept_norm.norm"],
    }
    Path("sweep.yaml").write_text(yaml.safe_dump(config))
    arguments = ("sweep", "--config", "sweep.yaml", "--jobs", "2")
    out = main(*arguments)[1]
    assert "stale" not in out
    before = trials_of(tmp_path)

    layer.write_text(layer.read_text().replace("nn.Identity()", "nn.Hardtanh(-1, 1)"))
    out = main(*arguments)[1]
    assert "stale: trial 0, 1: the source of swept_norm has changed\n--rerun stale" in out
    assert [trial["state"] for trial in trials_of(tmp_path)] == ["finished, stale"] * 2

    out = main(*arguments, "--rerun", "stale")[1]
    assert out.count("(retry of trial") == 2 and "stale" not in out
    after = trials_of(tmp_path)
    assert {t["model.lr"] for t in after} == {t["model.lr"] for t in before}
    assert {t["trial"] for t in after} == {"2", "3"} and len(after) == 2
    assert (tmp_path / "runs/sweep/trial-0/stale/0/result.json").is_file()
    result = yaml.safe_load((tmp_path / "runs/sweep/trial-0/0/result.json").read_text())
    assert result["finished"] and not result["resumed_at_steps"]


def parse(tmp_path, text, *arguments):
    (tmp_path / "c.yaml").write_text(text)
    return sweep.parse(["--config", str(tmp_path / "c.yaml"), *arguments])


SPACE = "sweep: {trials: 7, pruner: none, space: {model.lr: [1, 2]}}"


def test_options_override_the_sweep_section(tmp_path):
    options, space, common = parse(tmp_path, f"model: {{width: 3}}\n{SPACE}", "--model.lr", "1")
    assert (options.trials, options.sampler, options.pruner) == (7, "tpe", "none")
    assert list(space) == ["model.lr"]
    assert common == [*sweep.DEFAULTS, "--config", '{"model": {"width": 3}}', "--model.lr", "1"]
    options, _, _ = parse(tmp_path, SPACE, "--trials", "9", "--sampler", "random")
    assert (options.trials, options.sampler) == (9, "random")
    assert (options.jobs, options.name) == (1, "sweep")


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (
            "sweep: {space: {x: [1]}, trails: 3}",
            (),
            "`sweep` section: trails.\nAllowed settings: trials, sampler",
        ),
        ("sweep: {space: {x: [1]}, trials: many}", (), "trials is 'many'; it must be an integer"),
        ("sweep: {space: {x: [1]}, sampler: grid}", (), "Unknown sampler 'grid': use tpe or"),
        ("sweep: {space: [x]}", (), "No search space is given"),
        ("sweep: text", (), "is not a valid config"),
        ("[1, 2]", (), "is not a valid config"),
        ("a: {", (), "is not a valid config"),
        (SPACE, ("--jobs", "0"), "jobs is 0; it must be an integer of at least 1"),
        (SPACE, ("--trials", "x"), "argument --trials: invalid int value: 'x'"),
    ],
)
def test_invalid_options_and_configs_are_refused(tmp_path, text, arguments, message):
    with pytest.raises(UserError) as caught:
        parse(tmp_path, text, *arguments)
    assert message in str(caught.value)


SAMPLE = ("--data.source", "sample", "--trainer.accelerator", "cpu")


@pytest.mark.parametrize(
    ("common", "space"),
    [
        # Each scheduler needs its own arguments.
        (
            (),
            {
                "model.scheduler": ["CosineAnnealingLR", "StepLR"],
                "model.scheduler_args": [{"step_size": 2}, {"T_max": 5}],
            },
        ),
        # The common settings are valid only with a searched one.
        (("--model.scheduler", "StepLR"), {"model.scheduler_args.step_size": [1, 2]}),
    ],
)
@pytest.mark.filterwarnings("ignore:Choices for a categorical distribution")
def test_settings_that_are_valid_only_together_are_accepted(main, common, space):
    selection = sweep.Selection("val_acc", "max")
    plan = sweep._plan(EXPERIMENT, sweep.spaces.read(space), [*SAMPLE, *common], selection)
    assert plan.holds_out


def test_runs_that_are_too_short_for_a_validation_are_refused(main):
    Path("sweep.yaml").write_text(CONFIG)
    code, _, err = main(*ARGUMENTS, "--trainer.max_steps", "5", *SAMPLE)
    assert code == 2 and "--trainer.max_steps is 5, and the first validation is after step" in err
    assert not Path("runs").exists()
