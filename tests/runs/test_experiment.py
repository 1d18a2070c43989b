"""Importing an experiment, and the precedence of its defaults."""

import sys

import pytest
import torch

from bn_lightning import Classifier, Experiment, ImageData, UserError, cli
from bn_lightning.runs import experiment, run
from tests.projects.friedman.experiment import Regression, Table

FRIEDMAN = "tests.projects.friedman.experiment:EXPERIMENT"

NOT_AN_EXPERIMENT = {"task": Regression, "data": Table}
WRONG_TASK = Experiment(Table, Table, "wrong")
WRONG_DATA = Experiment(Regression, Regression, "wrong")
AN_OBJECT = Experiment(Regression, Table(), "wrong")
UNKNOWN_KEY = Experiment(Regression, Table, "wrong", {"model.widht": 3})
SMALL = Experiment(
    Regression,
    Table,
    "small",
    {
        "data.rows": 40,
        "data.batch_size": 5,
        "model.width": 6,
        "model.lr": 0.5,
        "model.optimizer": "Adam",
        "trainer.max_epochs": 4,
    },
)


def reference(name):
    return f"{__name__}:{name}"


def test_the_experiment_of_this_project():
    found = experiment.load(cli.EXPERIMENT)
    assert (found.task, found.data, found.name) == (Classifier, ImageData, "lenet")
    assert experiment.package_of(cli.EXPERIMENT) == "bn_lightning"


def test_the_experiment_of_another_project():
    found = experiment.load(FRIEDMAN)
    assert (found.task, found.data, found.name) == (Regression, Table, "friedman")
    assert experiment.package_of(FRIEDMAN) == "tests"
    assert experiment.load(reference("SMALL")) is SMALL


def test_an_experiment_is_immutable():
    with pytest.raises(AttributeError):
        SMALL.name = "other"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("no_such_package.experiment:EXPERIMENT", "No module named 'no_such_package'"),
        (reference("NOTHING"), "has no attribute 'NOTHING'"),
        (__name__, "cannot be imported"),  # no name
        (reference("NOT_AN_EXPERIMENT"), "is a dict; it must be a bn_lightning.Experiment"),
        (reference("WRONG_TASK"), r"The task of .*Table.* must be a subclass of bn_lightning.Task"),
        (reference("WRONG_DATA"), r"The data of .*must be a subclass of bn_lightning.DataModule"),
        (reference("AN_OBJECT"), r"The data of .*must be a subclass of bn_lightning.DataModule"),
    ],
)
def test_anything_but_an_experiment_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        experiment.load(given)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NOTHING", "has no attribute 'NOTHING'"),
        ("NOT_AN_EXPERIMENT", "must be a bn_lightning.Experiment"),
        ("WRONG_TASK", "must be a subclass of bn_lightning.Task"),
        ("UNKNOWN_KEY", "unknown setting: model.widht. Did you mean model.width?"),
    ],
)
def test_commands_exit_with_2_for_an_invalid_experiment(
    tmp_path, monkeypatch, capsys, name, message
):
    monkeypatch.chdir(tmp_path)
    for command in ("fit", "test"):
        monkeypatch.setattr(sys, "argv", ["small", command])
        with pytest.raises(SystemExit) as exited:
            cli.main(reference(name))
        assert exited.value.code == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and message in err
        assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def settings_of(*arguments, name="SMALL"):
    """Return the settings of `fit` without training."""
    return run.command_line(["fit", *arguments], reference(name), run.Rehearsal).config.fit


def test_precedence_is_defaults_checkpoint_config_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = {
        "state_dict": {},
        "hyper_parameters": {"width": 7, "lr": 0.7, "optimizer": "RMSprop"},
        "datamodule_hyper_parameters": {"rows": 70, "seed": 7, "folder": "of another machine"},
        "train_metrics": {},
        "optimizer_states": [],
    }
    torch.save(checkpoint, tmp_path / "some.ckpt")
    (tmp_path / "own.yaml").write_text("model: {lr: 0.8, optimizer: AdamW}\ndata: {rows: 80}\n")
    ckpt_path = ("--ckpt_path", "some.ckpt")
    config, flag = ("--config", "own.yaml"), ("--model.lr", "0.9")
    # Arguments, and the resulting rows, width, lr, optimizer and seed.
    expected = [
        ((), (40, 6, 0.5, "Adam", 0)),
        (ckpt_path, (70, 7, 0.7, "RMSprop", 7)),
        (config, (80, 6, 0.8, "AdamW", 0)),
        (flag, (40, 6, 0.9, "Adam", 0)),
        ((*ckpt_path, *config), (80, 7, 0.8, "AdamW", 7)),
        ((*ckpt_path, *config, *flag), (80, 7, 0.9, "AdamW", 7)),
        ((*flag, *ckpt_path, "--seed_everything", "5"), (70, 7, 0.9, "RMSprop", 5)),
    ]
    for arguments, values in expected:
        found = settings_of(*arguments)
        model, data = found.model, found.data
        shown = (data.rows, model.width, model.lr, model.optimizer, found.seed_everything)
        assert shown == values, arguments
        assert data.batch_size == 5  # only in the defaults
        assert data.folder == "tables"  # a machine setting is not read from a checkpoint
        assert found.trainer.max_epochs == 4
        assert found.name == "small"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.yaml", "some.ckpt"]


def test_objects_are_built_with_the_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    built = run.command_line(["fit", "--model.width", "9"], reference("SMALL"), run.Rehearsal)
    assert built.model.network[0].out_features == 9
    assert type(built.model.configure_optimizers()) is torch.optim.Adam
    assert (built.datamodule.rows, built.datamodule.batch_size) == (40, 5)
    assert built.trainer.max_epochs == 4
    assert built.trainer.global_step == 0
