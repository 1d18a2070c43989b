"""Restoring a task and a data module from a checkpoint."""

import sys

import pytest
import torch
from torch import nn

from bn_lightning import UserError
from bn_lightning.deploy.served import import_flags, restore
from bn_lightning.experiment import EXPERIMENT
from tests.projects.friedman import experiment as friedman
from tests.support.exports import FRIEDMAN, write_checkpoint, write_regression


class Doubling(nn.BatchNorm1d):
    def __init__(self, num_features, num_dims):
        super().__init__(num_features)


@pytest.mark.parametrize("named", [(), ("--model.norm", "custom"), ("--model.norm", "other.Norm")])
def test_an_import_path_in_a_checkpoint_alone_is_not_imported(main, tmp_path, named):
    (tmp_path / "planted.py").write_text("raise SystemExit('it was run')")
    ckpt = write_checkpoint(tmp_path / "some.ckpt")
    content = torch.load(ckpt, weights_only=True)
    content["hyper_parameters"]["norm"] = "planted.Norm"
    torch.save(content, ckpt)
    code, _, error = main("export", ckpt, "model.pt2", *named)
    assert code == 2 and "planted" not in sys.modules
    assert "'planted.Norm'" in error and (
        "--model.norm planted.Norm" in error or "--model.norm is" in error
    )
    assert not (tmp_path / "model.pt2").exists()


def change(path, section, **values):
    content = torch.load(path, weights_only=True)
    content[section] |= values
    torch.save(content, path)


def test_objects_of_the_experiment_package_are_trusted(tmp_path):
    norm = f"{__name__}.Doubling"
    ckpt = write_regression(tmp_path / "some.ckpt", norm=norm)
    assert isinstance(restore(str(ckpt), FRIEDMAN).task.network[1], Doubling)
    ckpt = write_checkpoint(tmp_path / "other.ckpt")
    change(ckpt, "hyper_parameters", norm=norm)
    with pytest.raises(UserError, match=r"contains the import path '.*Doubling' as norm"):
        restore(str(ckpt), "bn_lightning.experiment:EXPERIMENT")


def test_training_settings_are_not_restored(tmp_path):
    ckpt = write_regression(tmp_path / "some.ckpt")
    change(ckpt, "hyper_parameters", lr=0.3, scheduler="no_such_package.Scheduler", width=32)
    task = restore(str(ckpt), FRIEDMAN).task
    assert (task.hparams.lr, task.hparams.optimizer, task.hparams.scheduler) == (0.1, "SGD", None)
    assert not task.training and not any(p.requires_grad for p in task.parameters())


def test_data_settings_override_the_checkpoint(tmp_path):
    ckpt = write_regression(tmp_path / "some.ckpt")
    data = restore(str(ckpt), FRIEDMAN).data
    assert (data.hparams.rows, data.hparams.seed, data.hparams.folder) == (100, 3, "tables")
    data = restore(str(ckpt), FRIEDMAN, data_settings={"rows": 40, "folder": "here"}).data
    assert (data.hparams.rows, data.hparams.seed, data.hparams.folder) == (40, 3, "here")


def test_the_checkpoint_overrides_defaults_of_the_experiment(tmp_path, monkeypatch):
    defaults = {"model.width": 32, "data.rows": 60, "data.seed": 9, "trainer.max_epochs": 3}
    changed = friedman.Experiment(friedman.Regression, friedman.Table, "friedman", defaults)
    monkeypatch.setattr(friedman, "EXPERIMENT", changed)
    ckpt = write_regression(tmp_path / "some.ckpt")
    content = torch.load(ckpt, weights_only=True)
    del content["datamodule_hyper_parameters"]["rows"]
    torch.save(content, ckpt)
    data = restore(str(ckpt), FRIEDMAN).data
    assert (data.hparams.rows, data.hparams.seed) == (60, 3)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("hyper_parameters", {"depth": 3}, "does not match Regression: .*depth"),
        ("hyper_parameters", {"width": 16}, r"does not match Regression: Error\(s\) in loading"),
        ("datamodule_hyper_parameters", {"columns": 3}, "does not match Table: .*columns"),
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused(tmp_path, section, values, message):
    ckpt = write_regression(tmp_path / "some.ckpt")
    change(ckpt, section, **values)
    with pytest.raises(UserError, match=message):
        restore(str(ckpt), FRIEDMAN)


def test_a_state_dict_without_settings_uses_the_defaults(tmp_path):
    ckpt = write_regression(tmp_path / "some.ckpt")
    torch.save({"state_dict": torch.load(ckpt, weights_only=True)["state_dict"]}, ckpt)
    restored = restore(str(ckpt), FRIEDMAN, {"model.norm": "custom"})
    assert restored.data.hparams.rows == 1_000
    with pytest.raises(UserError, match=r"--model.norm is 'builtin', but .* with 'custom'"):
        restore(str(ckpt), FRIEDMAN, {"model.norm": "builtin"})


def test_network_norm_and_data_set_have_flags():
    names = ("model.network", "model.norm", "data.dataset")
    assert import_flags(EXPERIMENT) == {name: f"--{name}" for name in names}


def test_inputs_and_outputs_of_a_classifier_have_their_own_names(tmp_path):
    regression = restore(str(write_regression(tmp_path / "some.ckpt")), FRIEDMAN).serve()
    assert (regression.input_name, regression.output_name) == ("inputs", "outputs")
    ckpt = str(write_checkpoint(tmp_path / "other.ckpt", normalize=True))
    restored = restore(ckpt, "bn_lightning.experiment:EXPERIMENT")
    classifier = restored.serve()
    assert (classifier.input_name, classifier.output_name) == ("images", "logits")
    assert classifier.network is restored.task.network
    images = torch.randint(256, (3, 28, 28), dtype=torch.uint8)
    inputs = (images.unsqueeze(1) / 255 - 0.2860) / 0.3530
    torch.testing.assert_close(classifier(images), restored.task(inputs))
    # An empty nn.Sequential is falsy.
    empty = nn.Sequential()
    assert restored.serve(empty).network is empty
