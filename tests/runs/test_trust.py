"""Import paths that only a checkpoint names are not imported."""

import sys

import pytest
import torch

from bn_lightning import Experiment, UserError, cli
from bn_lightning.runs import experiment, run, trust
from bn_lightning.tasks.classifier import Classifier
from tests.conftest import QUICK
from tests.projects.friedman.experiment import Regression, Table


def test_an_import_path_that_only_a_checkpoint_names_is_refused(main, trained, tmp_path):
    """It could name any installed module, so the user must set it on the command line."""
    (tmp_path / "trap.py").write_text(
        "open('imported', 'w')\nfrom bn_lightning import BatchNorm as Norm\n"
    )
    checkpoint = torch.load(trained[0] / "checkpoints" / "best.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["norm"] = "trap.Norm"
    torch.save(checkpoint, tmp_path / "trap.ckpt")
    code, _, err = main("test", "--ckpt_path", "trap.ckpt")
    assert code == 2
    assert "set it on the command line: --model.norm trap.Norm" in err
    assert not (tmp_path / "imported").exists()
    assert main("test", "--ckpt_path", "trap.ckpt", "--model.norm", "trap.Norm")[0] == 0
    assert (tmp_path / "imported").exists()


# A package with an experiment whose task and data module each have an import path

EXPERIMENT = """\
from bn_lightning import Experiment
from shop.parts import ShopData, ShopTask

EXPERIMENT = Experiment(
    ShopTask, ShopData, "shop", {"model.optimizer": "outside.Chosen", "data.source": "outside.read"}
)
"""
PARTS = """\
from outside import Adam, read
from tests.projects.friedman.experiment import Regression, Table
from torch.optim import SGD


class Own(SGD):
    pass


def make():
    pass


class ShopTask(Regression):
    pass


class ShopData(Table):
    import_paths = ("source",)
    machine_settings = ()

    def __init__(self, source: str = "rows", **loading) -> None:
        super().__init__(**loading)
"""
OUTSIDE = """\
from torch.optim import Adam, SGD


class Chosen(SGD):
    pass


def read():
    pass
"""
SHOP = "shop.experiment:EXPERIMENT"


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """Write the package, and return a function that writes a checkpoint.

    `shop(optimizer, source)` writes x.ckpt with these settings.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop/__init__.py").touch()
    (tmp_path / "shop/experiment.py").write_text(EXPERIMENT)
    (tmp_path / "shop/parts.py").write_text(PARTS)
    (tmp_path / "outside.py").write_text(OUTSIDE)
    (tmp_path / "trap.py").write_text("open('imported', 'w')\nfrom torch.optim import Adam\n")

    def write(optimizer="SGD", source="rows"):
        content = {
            "state_dict": {},
            "hyper_parameters": {"optimizer": optimizer},
            "datamodule_hyper_parameters": {"source": source, "seed": 0},
            "train_metrics": {},
            "optimizer_states": [],
        }
        torch.save(content, tmp_path / "x.ckpt")

    yield write
    assert not (tmp_path / "imported").exists()
    for name in [n for n in sys.modules if n.partition(".")[0] in ("shop", "outside", "trap")]:
        del sys.modules[name]


def rehearse(*arguments, command="fit"):
    given = [command, "--ckpt_path", "x.ckpt", "--trainer.accelerator", "cpu", *arguments]
    return run.command_line(given, SHOP, run.Rehearsal).config[command]


@pytest.mark.parametrize("command", ["fit", "test", "validate"])
@pytest.mark.parametrize(
    ("optimizer", "source"),
    [
        ("AdamW", "rows"),  # registered names
        ("outside.Chosen", "outside.read"),  # defaults of the experiment
        ("shop.parts.Own", "shop.parts.make"),  # defined in its package
    ],
)
def test_known_objects_are_trusted(shop, command, optimizer, source):
    shop(optimizer, source)
    found = rehearse(command=command)
    assert (found.model.optimizer, found.data.source) == (optimizer, source)


@pytest.mark.parametrize(
    "path",
    [
        "torch.optim.AdamW",
        "trap.Adam",
        "no_such_module.Name",
        "shop.no_such_module.Name",
        "shop.parts.no_such_name",
        "shop.parts.SGD",  # imported from elsewhere
        "shop.parts.read",
        "shopping.parts.Own",  # a package with the same prefix
        "outside.read.Chosen",
    ],
)
@pytest.mark.parametrize("setting", ["model.optimizer", "data.source"])
def test_other_import_paths_are_refused(shop, setting, path):
    section, name = setting.split(".")
    shop(**{name: path})
    with pytest.raises(UserError) as refused:
        rehearse()
    message = str(refused.value)
    assert f"'x.ckpt' contains the import path {path!r} as {name}." in message
    assert f"set it on the command line: --{section}.{name} {path}" in message


@pytest.mark.parametrize("how", ["flag", "config"])
def test_settings_of_the_user_are_trusted(shop, tmp_path, how):
    shop("torch.optim.AdamW", "os.path.join")
    (tmp_path / "own.yaml").write_text(
        "model: {optimizer: torch.optim.AdamW}\ndata: {source: os.path.join}\n"
    )
    flags = ("--model.optimizer", "torch.optim.AdamW", "--data.source", "os.path.join")
    found = rehearse(*(flags if how == "flag" else ("--config", "own.yaml")))
    assert (found.model.optimizer, found.data.source) == ("torch.optim.AdamW", "os.path.join")
    with pytest.raises(UserError, match=r"--data\.source os\.path\.join"):
        rehearse(*flags[:2])  # each setting must be set


def test_settings_of_the_user_replace_untrusted_ones(shop):
    shop("trap.Adam", "trap.read")
    found = rehearse("--model.optimizer", "Adam", "--data.source", "rows")
    assert (found.model.optimizer, found.data.source) == ("Adam", "rows")


def test_task_and_data_declare_their_import_paths(shop):
    paths = trust.import_paths(experiment.load(cli.EXPERIMENT))
    assert paths == ["model.norm", "model.optimizer", "model.scheduler"]
    assert trust.import_paths(experiment.load(SHOP)) == [
        "model.norm",
        "model.optimizer",
        "model.scheduler",
        "data.source",
    ]

    class Bare(Regression):
        import_paths = ()

    assert trust.import_paths(Experiment(Bare, Table, "bare")) == []


def test_the_error_names_the_flag_of_the_command():
    used = {"model.norm": "no.Norm", "model.lr": 0.1, "model.scheduler": None}
    with pytest.raises(UserError, match=r"command line: --norm no\.Norm"):
        trust.refuse_untrusted("x.ckpt", used, {}, "bn_lightning", {"model.norm": "--norm"})
    trust.refuse_untrusted("x.ckpt", used, {"model.norm": "no.Norm"}, "bn_lightning")


def test_import_paths_of_this_package_are_trusted(main, trained, tmp_path):
    checkpoint = torch.load(trained[0] / "checkpoints" / "best.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["norm"] = "bn_lightning.norms.layer.BatchNorm"
    torch.save(checkpoint, tmp_path / "own.ckpt")
    code, _, err = main("test", "--ckpt_path", "own.ckpt")
    assert code == 0, err


def test_resume_trusts_the_settings_of_the_run(main, tmp_path):
    """They are read from config.yaml, and were set by the user when the run started."""
    (tmp_path / "own_norm.py").write_text("from bn_lightning import BatchNorm as Norm\n")
    few = ("--trainer.limit_train_batches", 2, "--trainer.max_epochs", 1)
    assert main("fit", *QUICK, *few, "--model.norm", "own_norm.Norm")[0] == 0
    code, _, err = main("fit", "--resume", "runs/lenet/0", "--trainer.max_epochs", 2)
    assert code == 0, err
    assert Classifier.import_paths[0] == "norm"
