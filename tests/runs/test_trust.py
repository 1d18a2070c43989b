"""Import paths that only a checkpoint names are not imported."""

import shutil
import sys

import pytest
import torch
import yaml

from bn_lightning import Experiment, UserError, cli
from bn_lightning.runs import experiment, run, trust
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


TRAP = {"class_path": "trap.Norm", "init_args": {"num_features": 3}}


@pytest.mark.parametrize(
    "settings",
    [
        {"norm_args": {"eps": TRAP}},
        {"norm_args": {"eps": [{"of": TRAP}]}},
        {"norm_args": {"eps": str(TRAP)}},
        {"norm_args": {"eps": '{"class\\u005fpath": "trap.Norm"}'}},
        {"norm_args": str({"eps": TRAP})},
        {"augment": [{"name": "RandomErasing", "args": TRAP}]},
    ],
    ids=str,
)
def test_no_object_is_created_from_the_settings_of_a_checkpoint(main, trained, tmp_path, settings):
    (tmp_path / "trap.py").write_text(
        "open('imported', 'w')\nfrom bn_lightning import BatchNorm as Norm\n"
    )
    checkpoint = torch.load(trained[0] / "checkpoints" / "best.ckpt", weights_only=True)
    section = "datamodule_hyper_parameters" if "augment" in settings else "hyper_parameters"
    checkpoint[section] |= settings
    torch.save(checkpoint, tmp_path / "trap.ckpt")
    code, _, err = main("test", "--ckpt_path", "trap.ckpt")
    assert (code, "contains the object 'trap.Norm' in the setting" in err) == (2, True)
    assert not (tmp_path / "imported").exists()


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
    model = ["model.network", "model.norm", "model.optimizer", "model.scheduler"]
    assert paths == [*model, "data.dataset"]
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
        trust.refuse_untrusted("x.ckpt", used, {}, "bn_lightning", {}, {"model.norm": "--norm"})
    trust.refuse_untrusted("x.ckpt", used, {"model.norm": "no.Norm"}, "bn_lightning", {})


def test_import_paths_of_this_package_are_trusted(main, trained, tmp_path):
    checkpoint = torch.load(trained[0] / "checkpoints" / "best.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["norm"] = "bn_lightning.norms.layer.BatchNorm"
    torch.save(checkpoint, tmp_path / "own.ckpt")
    code, _, err = main("test", "--ckpt_path", "own.ckpt")
    assert code == 0, err


# The folder of a run

# The run has ended, so it is only tested again.
RESUME = ("fit", "--resume", "runs/lenet/0", "--trainer.limit_test_batches", 1)


@pytest.fixture
def planted(main, trained, tmp_path):
    """Return a function that adds settings to the folder of a new run.

    The module `trap` writes the file `imported` when it is imported. While the parser reads a
    config file, the current folder is that of the file.
    """
    shutil.copytree(trained[0], tmp_path / "runs/lenet/0")
    (tmp_path / "trap.py").write_text(
        "open('imported', 'w')\n"
        "from bn_lightning import BatchNorm as Norm, NormMonitor\n\n\n"
        "def call(*args):\n    pass\n"
    )

    def plant(changes, file):
        path = tmp_path / "runs/lenet/0" / file
        settings = yaml.safe_load(path.read_text()) if path.exists() else {}
        for section, values in changes.items():
            settings.setdefault(section, {}).update(values)
        path.write_text(yaml.safe_dump(settings))

    return plant


@pytest.mark.parametrize("file", ["config.yaml", "resumed-1.yaml"])
def test_an_import_path_that_only_the_folder_of_a_run_names_is_refused(
    planted, main, tmp_path, file
):
    planted({"model": {"norm": "trap.Norm"}}, file)
    code, _, err = main(*RESUME)
    assert code == 2
    assert "'runs/lenet/0' contains the import path 'trap.Norm' as norm." in err
    assert "set it on the command line: --model.norm trap.Norm" in err
    assert not list(tmp_path.rglob("imported"))
    assert main(*RESUME, "--model.norm", "trap.Norm")[0] == 0
    assert list(tmp_path.rglob("imported"))


LAMBDA = {"class_path": "lightning.pytorch.callbacks.LambdaCallback"}


@pytest.mark.parametrize(
    "trainer",
    [
        {"callbacks": [{"class_path": "trap.NormMonitor"}]},
        {"callbacks": {"class_path": "trap.NormMonitor", "init_args": {"every_n_steps": 3}}},
        {"callbacks": ["trap.NormMonitor"]},
        {"callbacks": [LAMBDA | {"init_args": {"on_fit_start": "trap.call"}}]},
        {"logger": {"class_path": "trap.Logger"}},
        {"plugins": "trap.Plugin"},
    ],
    ids=str,
)
def test_objects_that_only_the_folder_of_a_run_names_are_refused(planted, main, tmp_path, trainer):
    planted({"trainer": trainer}, "config.yaml")
    code, _, err = main(*RESUME)
    assert (code, "contains the import path 'trap." in err) == (2, True)
    assert "--config runs/lenet/0/config.yaml" in err
    assert not list(tmp_path.rglob("imported"))


@pytest.mark.parametrize("value", [TRAP, str(TRAP)], ids=["object", "string"])
def test_no_object_is_created_from_arguments_in_the_folder_of_a_run(planted, main, tmp_path, value):
    planted({"model": {"norm_args": {"eps": value}}}, "config.yaml")
    code, _, err = main(*RESUME)
    assert (code, "contains the import path 'trap.Norm'" in err) == (2, True)
    assert not list(tmp_path.rglob("imported"))


def test_the_settings_files_of_a_run_are_trusted_if_the_user_names_them(planted, main, tmp_path):
    callback = {"class_path": "trap.NormMonitor", "init_args": {"every_n_steps": 3}}
    planted({"trainer": {"callbacks": [callback]}}, "config.yaml")
    code, _, err = main(*RESUME, "--config", "runs/lenet/0/config.yaml")
    assert code == 0, err
    assert list(tmp_path.rglob("imported"))


def test_objects_of_lightning_and_of_this_package_are_trusted_in_the_folder_of_a_run(planted, main):
    monitor = {"class_path": "bn_lightning.monitoring.norm_monitor.NormMonitor"}
    names = {"dirpath": "some.folder", "monitor": "val_acc", "filename": "{epoch}.best"}
    saves = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": names}
    planted({"trainer": {"callbacks": [monitor, saves]}}, "config.yaml")
    code, _, err = main(*RESUME)
    assert code == 0, err


def test_the_command_that_resumes_a_run_names_its_import_paths(shop):
    shop()
    given = ["fit", "--trainer.accelerator", "cpu", "--model.optimizer"]
    for optimizer, flags in (
        ("torch.optim.AdamW", " --model.optimizer torch.optim.AdamW"),
        ("AdamW", ""),
        ("shop.parts.Own", ""),
        ("outside.Chosen", ""),
    ):
        cli_of_run = run.command_line([*given, optimizer], SHOP, run.Rehearsal)
        cli_of_run.folder = "runs/shop/0"
        assert cli_of_run.resume_command().endswith(f" fit --resume runs/shop/0{flags}")


def test_names_with_a_registered_prefix_need_no_trust():
    registered = trust.registered(experiment.load(cli.EXPERIMENT))
    assert registered == {"model.network": "torchvision."}
    used = {"model.network": "torchvision.resnet18", "model.norm": "torchvision.ops.Evil"}
    assert trust.untrusted(used, {}, "bn_lightning", registered) == {
        "model.norm": "torchvision.ops.Evil"
    }
