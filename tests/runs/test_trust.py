"""Code that only a checkpoint names is not executed."""

import sys

import pytest
import torch

from bn_lightning import Experiment, UserError, cli
from bn_lightning.runs import experiment, run, trust
from bn_lightning.tasks.classifier import Classifier
from tests.conftest import QUICK
from tests.projects.friedman.experiment import Regression, Table


def test_code_that_only_a_checkpoint_names_is_not_run(main, trained, tmp_path):
    """An import path in a checkpoint could name anything that is installed: it has to be typed."""
    (tmp_path / "trap.py").write_text(
        "open('sprung', 'w')\nfrom bn_lightning import BatchNorm as Norm\n"
    )
    checkpoint = torch.load(trained[0] / "checkpoints" / "best.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["norm"] = "trap.Norm"
    torch.save(checkpoint, tmp_path / "trap.ckpt")
    code, _, err = main("test", "--ckpt_path", "trap.ckpt")
    assert code == 2
    assert "name it yourself: --model.norm trap.Norm" in err
    assert not (tmp_path / "sprung").exists()
    assert main("test", "--ckpt_path", "trap.ckpt", "--model.norm", "trap.Norm")[0] == 0
    assert (tmp_path / "sprung").exists()


# A package with an experiment whose task and data module both have an import path

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
    """Write the package, and return what writes a checkpoint with an optimizer and a source."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop/__init__.py").touch()
    (tmp_path / "shop/experiment.py").write_text(EXPERIMENT)
    (tmp_path / "shop/parts.py").write_text(PARTS)
    (tmp_path / "outside.py").write_text(OUTSIDE)
    (tmp_path / "trap.py").write_text("open('sprung', 'w')\nfrom torch.optim import Adam\n")

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
    assert not (tmp_path / "sprung").exists()
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
def test_what_is_trusted_without_being_typed(shop, command, optimizer, source):
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
        "shopping.parts.Own",  # a package whose name begins alike
        "outside.read.Chosen",
    ],
)
@pytest.mark.parametrize("setting", ["model.optimizer", "data.source"])
def test_what_is_not(shop, setting, path):
    section, name = setting.split(".")
    shop(**{name: path})
    with pytest.raises(UserError) as refused:
        rehearse()
    message = str(refused.value)
    assert f"'x.ckpt' asks for the {name} {path!r}, an import path" in message
    assert f"name it yourself: --{section}.{name} {path}" in message


@pytest.mark.parametrize("how", ["flag", "config"])
def test_what_is_typed_is_trusted(shop, tmp_path, how):
    shop("torch.optim.AdamW", "os.path.join")
    (tmp_path / "own.yaml").write_text(
        "model: {optimizer: torch.optim.AdamW}\ndata: {source: os.path.join}\n"
    )
    flags = ("--model.optimizer", "torch.optim.AdamW", "--data.source", "os.path.join")
    found = rehearse(*(flags if how == "flag" else ("--config", "own.yaml")))
    assert (found.model.optimizer, found.data.source) == ("torch.optim.AdamW", "os.path.join")
    with pytest.raises(UserError, match=r"--data\.source os\.path\.join"):
        rehearse(*flags[:2])  # each setting has to be typed


def test_another_that_is_typed_takes_the_place_of_what_is_not_trusted(shop):
    shop("trap.Adam", "trap.read")
    found = rehearse("--model.optimizer", "Adam", "--data.source", "rows")
    assert (found.model.optimizer, found.data.source) == ("Adam", "rows")


def test_task_and_data_declare_which_settings_are_import_paths(shop):
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


def test_another_command_names_its_own_flag():
    used = {"model.norm": "no.Norm", "model.lr": 0.1, "model.scheduler": None}
    with pytest.raises(UserError, match=r"name it yourself: --norm no\.Norm"):
        trust.refuse_untrusted("x.ckpt", used, {}, "bn_lightning", {"model.norm": "--norm"})
    trust.refuse_untrusted("x.ckpt", used, {"model.norm": "no.Norm"}, "bn_lightning")


def test_a_norm_of_this_package_is_trusted_by_its_path(main, trained, tmp_path):
    checkpoint = torch.load(trained[0] / "checkpoints" / "best.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["norm"] = "bn_lightning.norms.layer.BatchNorm"
    torch.save(checkpoint, tmp_path / "own.ckpt")
    code, _, err = main("test", "--ckpt_path", "own.ckpt")
    assert code == 0, err


def test_resume_reads_the_file_of_settings_which_is_the_users(main, tmp_path):
    """--resume takes the settings of config.yaml, so that what was typed then is trusted now."""
    (tmp_path / "own_norm.py").write_text("from bn_lightning import BatchNorm as Norm\n")
    few = ("--trainer.limit_train_batches", 2, "--trainer.max_epochs", 1)
    assert main("fit", *QUICK, *few, "--model.norm", "own_norm.Norm")[0] == 0
    code, _, err = main("fit", "--resume", "runs/lenet/0", "--trainer.max_epochs", 2)
    assert code == 0, err
    assert Classifier.import_paths[0] == "norm"
