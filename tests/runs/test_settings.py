"""Settings of a run from flags, configs and checkpoints, and the errors for invalid ones."""

import pytest
import torch

from bn_lightning import UserError, cli
from bn_lightning.data import files, sources
from bn_lightning.runs import run, settings
from tests.conftest import BRIEF


def test_settings_of_a_checkpoint_are_used_and_flags_override_them(main, tmp_path):
    """The precedence is defaults < checkpoint < --config < flags."""
    in_checkpoint = (
        *("--model.norm", "builtin", "--model.norm_args.eps", "1e-3"),
        *("--model.activation", "relu", "--data.batch_size", "128", "--seed_everything", "7"),
        *("--trainer.max_epochs", 1),
    )
    assert main("fit", *BRIEF, *in_checkpoint)[0] == 0
    checkpoint = tmp_path / "runs" / "lenet" / "0" / "checkpoints" / "last.ckpt"
    (tmp_path / "own.yaml").write_text("data:\n  batch_size: 64\nmodel:\n  lr: 0.5\n")
    own = (
        *("--config", "own.yaml", "--model.lr", "0.25"),
        *("--trainer.max_epochs", "2", "--trainer.limit_train_batches", 2),
        *("--trainer.limit_val_batches", 1, "--trainer.limit_test_batches", 1),
    )
    assert main("fit", "--ckpt_path", checkpoint, *own)[0] == 0
    saved = torch.load(tmp_path / "runs/lenet/0/checkpoints/last.ckpt", weights_only=True)
    model, data = saved["hyper_parameters"], saved["datamodule_hyper_parameters"]
    assert (model["norm"], model["norm_args"]) == ("builtin", {"eps": 1e-3})
    assert model["activation"] == "relu"
    assert (data["source"], data["seed"]) == ("sample", 7)
    assert (data["batch_size"], model["lr"]) == (64, 0.25)


def test_settings_in_a_checkpoint_have_the_names_of_flags():
    checkpoint = {
        "hyper_parameters": {"lr": 0.5, "norm_args": {"eps": 1e-3}},
        "datamodule_hyper_parameters": {"source": "sample", "root": "/a", "seed": 3},
    }
    assert settings.settings_in(checkpoint, ("root", "mirrors")) == {
        "seed_everything": 3,
        "data.source": "sample",
        "model.lr": 0.5,
        "model.norm_args": {"eps": 1e-3},
    }
    assert settings.settings_in(checkpoint, ())["data.root"] == "/a"
    assert settings.settings_in({"state_dict": {}}, ("root",)) == {}
    assert checkpoint["datamodule_hyper_parameters"]["root"] == "/a"  # unchanged


def test_ckpt_path_last_without_a_checkpoint_starts_a_run(main, tmp_path):
    code, out, _ = main("fit", *BRIEF, "--ckpt_path", "last")
    assert code == 0
    assert "No run in 'runs/lenet' has a checkpoint yet: starting a new run." in out
    assert [path.name for path in (tmp_path / "runs/lenet").iterdir()] == ["0"]
    code, _, err = main("test", "--ckpt_path", "last", "--name", "other")
    assert code == 2
    assert "No run in 'runs/other' has a checkpoint. Set --name to the name of existing runs" in err


@pytest.mark.parametrize(
    ("folder", "message"), [("nowhere", "no config.yaml"), ("empty", "no intact checkpoint")]
)
def test_resume_needs_a_run_with_a_checkpoint(main, tmp_path, folder, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.yaml").touch()
    code, _, err = main("fit", "--resume", folder)
    assert code == 2
    assert message in err


def test_resume_without_saving_is_refused(main, trained):
    for flags in (("--trainer.fast_dev_run", "true"), ("--trainer.enable_checkpointing", "false")):
        code, _, err = main("fit", "--resume", trained[0], *flags)
        assert code == 2
        assert "--resume writes checkpoints to the run's folder" in err
        assert f"--ckpt_path {trained[0]}/checkpoints/last.ckpt --name trial" in err


@pytest.mark.parametrize("name", ["test", "validate", "predict"])
def test_a_command_without_its_checkpoint_is_refused(main, name):
    code, _, err = main(name)
    assert code == 2
    assert f"{name} needs a checkpoint. Use --ckpt_path" in err
    assert "runs/lenet/0/checkpoints/best.ckpt" in err and "newest run in runs/lenet" in err


WRONG = {
    "norm": (
        ["--model.norm", "batch"],
        ["'batch'", "article, renorm, ghost, frozen, group, layer, instance, rms, none"],
    ),
    "norm that the network cannot have": (
        ["--model.norm", "instance"],
        ["'instance' cannot be used behind a linear layer", "--model.norm layer or group"],
    ),
    "norm argument": (["--model.norm_args.epsilon", "1"], ["epsilon", "eps"]),
    "flag": (["--model.nrom", "custom"], ["--model.nrom", "Did you mean --model.norm"]),
    "choice": (["--model.activation", "rleu"], ["rleu", "'relu'"]),
    "type": (["--data.batch_size", "many"], ["data.batch_size", "many"]),
    "value": (["--data.batch_size", "0"], ["batch_size is 0", "at least 1"]),
    "seed": (["--seed_everything", "-1"], ["--seed_everything is -1", "from 0 to 4294967295"]),
    "folder": (["--data.source", "nowhere"], ["'nowhere'", "auto, system, download or sample"]),
    "truncated file": (["--data.source", "half"], ["train-labels-idx1-ubyte", "60,008 bytes"]),
    "config": (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
    "key in a config": (["--config", "wrong.yaml"], ["nrom"]),
    "checkpoint": (
        ["--ckpt_path", "nowhere.ckpt"],
        ["'nowhere.ckpt'", "runs/NAME/N/checkpoints"],
    ),
    "no checkpoint": (
        ["--ckpt_path", "wrong.yaml"],
        ["'wrong.yaml' is corrupt or is not a checkpoint"],
    ),
    "truncated checkpoint": (
        ["--ckpt_path", "half.ckpt"],
        ["'half.ckpt' is corrupt or is not a checkpoint"],
    ),
    "not a run": (["--ckpt_path", "tensor.ckpt"], ["'tensor.ckpt' is not a checkpoint of a run"]),
    "foreign checkpoint": (["--ckpt_path", "foreign.ckpt"], ["'foreign.ckpt'", "hidden"]),
    "strategy": (["--trainer.strategy", "ddp_spawn"], ["ddp_spawn", "--trainer.strategy ddp "]),
    "barebones": (
        ["--trainer.barebones", "true"],
        ["--trainer.barebones true", "--trainer.logger false"],
    ),
    "interval": (["--trainer.val_check_interval", "0"], ["val_check_interval is 0", "above 0"]),
    "optimizer": (["--model.optimizer", "Adan"], ["'Adan'", "AdamW"]),
    "accelerator": (
        ["--trainer.accelerator", "tpu"],
        ["tpu", "Accelerators of this machine: cpu"],
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_mistakes_give_one_screen_and_no_files(main, trained, tmp_path, what):
    (tmp_path / "wrong.yaml").write_text("model:\n  nrom: custom\n")
    last = trained[0] / "checkpoints" / "last.ckpt"
    (tmp_path / "half.ckpt").write_bytes(last.read_bytes()[:100_000])
    torch.save(torch.zeros(3), tmp_path / "tensor.ckpt")
    torch.save({"state_dict": {}, "hyper_parameters": {"hidden": 3}}, tmp_path / "foreign.ckpt")
    half = tmp_path / "half"
    half.mkdir()
    for file in files.FULL:
        header = b"\0\0\x08" + bytes([len(file.shape)])
        (half / file.name).write_bytes(header + b"\0" * 1_000)
    if (first := half / files.TRAIN_IMAGES).exists() and sources.SYSTEM.is_dir():
        # The first file is complete, so the error must name the second.
        first.unlink()
        (half / f"{first.name}.gz").symlink_to(sources.SYSTEM / f"{first.name}.gz")
    elif what == "truncated file":
        pytest.skip(f"needs all of Fashion-MNIST in {sources.SYSTEM}")
    before = sorted(tmp_path.rglob("*"))
    flags, messages = WRONG[what]
    code, _, err = main("fit", *flags)
    assert code == 2
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 24
    for message in messages:
        assert message in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("--model.optimiser", "--model.optimizer"),
        ("--trainer.max_epocs", "--trainer.max_epochs"),
        ("--trainer.max_setps", "--trainer.max_steps"),
        ("--model.memory_formats", "--model.memory_format"),
        ("--data.batchsize", "--data.batch_size"),
        ("--lr", "--model.lr?"),
        ("--batchsize", "--data.batch_size?"),
        ("--norm_args.eps", "--model.norm_args.eps?"),
        ("--model.nrom", "--model.norm?"),
        ("--epochs", "--trainer.min_epochs or --trainer.max_epochs?"),
    ],
)
def test_an_error_names_the_nearest_setting(main, given, near):
    code, _, err = main("fit", given, "1")
    assert code == 2
    assert f"Did you mean {near}" in err
    flag = "--help.trainer" if "trainer" in given else "--help"
    assert err.endswith(f"All settings: python -m bn_lightning fit {flag}\n")


def test_an_error_names_no_setting_if_none_is_near(main):
    code, _, err = main("fit", "--colour", "red")
    assert code == 2
    assert "--colour" in err and "Did you mean" not in err
    # A setting of another command is unknown here.
    code, _, err = main("test", "--checkpoint.every_n_train_steps", "3")
    assert code == 2 and "All settings: python -m bn_lightning test --help" in err


@pytest.mark.parametrize(
    "config",
    [
        ["--config", "own.yaml"],
        ["--config=own.yaml"],
        ["-c", "own.yaml"],
        ["--model", "model.yaml"],
        ['--model={"lr": 0.125, "norm": "builtin"}'],
    ],
)
@pytest.mark.parametrize("is_first", [True, False])
def test_flags_override_a_config_in_either_order(tmp_path, monkeypatch, config, is_first):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text("model:\n  lr: 0.125\n  norm: builtin\n")
    (tmp_path / "model.yaml").write_text("lr: 0.125\nnorm: builtin\n")
    flags = ["--model.lr", "0.5", "--data.source", "sample"]
    arguments = [*config, *flags] if is_first else [*flags, *config]
    built = run.command_line(["fit", *arguments], cli.EXPERIMENT, run.Rehearsal)
    assert (built.config.fit.model.lr, built.config.fit.model.norm) == (0.5, "builtin")


def test_a_later_config_overrides_an_earlier_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, rate in (("a", 0.125), ("b", 0.25)):
        (tmp_path / f"{name}.yaml").write_text(f"model:\n  lr: {rate}\n")
    arguments = ["--config", "a.yaml", "--data.source", "sample", "--config", "b.yaml"]
    # A setting of a callback belongs to the callback before it.
    for name in ("LearningRateMonitor", "DeviceStatsMonitor"):
        arguments += [f"--trainer.callbacks+={name}"]
        if name == "LearningRateMonitor":
            arguments += ["--trainer.callbacks.logging_interval", "epoch"]
    built = run.command_line(["fit", *arguments], cli.EXPERIMENT, run.Rehearsal)
    assert built.config.fit.model.lr == 0.25
    assert built.config.fit.trainer.callbacks[0].init_args.logging_interval == "epoch"


def test_a_command_line_has_only_its_own_commands():
    assert sorted(run.CLI.commands) == ["fit", "test", "validate"]
    built = run.command_line(["fit", "--data.source", "sample"], cli.EXPERIMENT, run.Rehearsal)
    assert list(built.subcommands()) == ["fit"]
    assert "weights_only" in built.subcommands()["fit"]  # not a setting
    with pytest.raises(UserError, match="predict"):
        run.command_line(["predict"], cli.EXPERIMENT, run.Rehearsal)
