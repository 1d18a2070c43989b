"""`compare` end to end: which runs it trains, and what its tables contain."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from PIL import Image

from tests.conftest import run_here

QUICK = ("--data.source", "sample", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu")
NORM = """\
import torch
from torch import nn


class Random(nn.BatchNorm2d):
    def __new__(cls, num_features, num_dims):
        torch.rand(100)  # consumes random numbers
        return (nn.BatchNorm2d if num_dims == 4 else nn.BatchNorm1d)(num_features)
"""
FEW = (
    *(*QUICK, "--trainer.limit_train_batches", "5"),
    *("--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1"),
)
NORMS = ("builtin", "none", "random_norm.Random")
ARGUMENTS = ("compare", "--norm", *NORMS, "--seeds", "2", "--jobs", "2", *FEW)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder of a comparison on the sample, and its output. No test may change it."""
    cwd = tmp_path_factory.mktemp("compared")
    (cwd / "random_norm.py").write_text(NORM)
    return cwd, run_here(*ARGUMENTS, cwd=cwd).stdout


def table_of(text):
    """Return the output without the lines of single runs."""
    return [line for line in text.splitlines() if not line.startswith("[")]


def test_tables_contain_the_results_of_the_runs(compared):
    folder = compared[0] / "runs/compare"
    lines = list(csv.DictReader((folder / "runs.csv").open()))
    assert [(line["choice"], line["seed"]) for line in lines] == [
        (norm, str(seed)) for seed in (0, 1) for norm in NORMS
    ]
    for line in lines:
        result = json.loads((compared[0] / line["folder"] / "result.json").read_text())
        assert result["finished"]
        assert (result["norm"], result["seed"]) == (line["choice"], int(line["seed"]))
        for name in ("train loss", "val acc", "test acc"):
            assert float(line[name]) == result[name.replace(" ", "_")], name
        assert float(line["samples per second"]) == result["images_per_second"]
        settings = yaml.safe_load((compared[0] / line["folder"] / "config.yaml").read_text())
        assert settings["monitor"] is False
    rows = json.loads((folder / "table.json").read_text())["rows"]
    [mean] = [row["mean"] for row in rows if (row["figure"], row["choice"]) == ("test acc", "none")]
    accuracies = [float(line["test acc"]) for line in lines if line["choice"] == "none"]
    assert mean == pytest.approx(sum(accuracies) / 2)
    assert (folder / "table.txt").read_text() in compared[1]
    header = "| test acc | n | mean ± sd | 95% interval | vs builtin (95%) | d |"
    assert header in (folder / "table.md").read_text()
    with Image.open(folder / "curves.png") as picture:
        assert len(picture.convert("L").getcolors(256)) > 50


def test_variants_with_the_same_seed_start_from_the_same_weights(compared, monkeypatch):
    monkeypatch.syspath_prepend(compared[0])
    from bn_lightning import LeNet

    networks = []
    for norm in ("custom", "none", "random_norm.Random"):
        torch.manual_seed(0)
        networks.append(dict(LeNet(norm).named_parameters()))
    for name, value in networks[1].items():
        assert all(torch.equal(network[name], value) for network in networks), name


def test_a_finished_comparison_trains_nothing_and_prints_the_same_tables(compared):
    files = [path for path in compared[0].rglob("*") if path.parent.name == "checkpoints"]
    before = {path: path.stat().st_mtime_ns for path in files}
    again = run_here(*ARGUMENTS, cwd=compared[0]).stdout
    assert "[" not in again and table_of(again) == table_of(compared[1])
    assert {path: path.stat().st_mtime_ns for path in files} == before


def test_other_settings_under_the_same_name_are_refused(compared):
    done = run_here(*ARGUMENTS, "--model.lr", "0.5", cwd=compared[0], check=False)
    assert done.returncode == 2 and "--model.lr was 1.0 and is now 0.5" in done.stderr


def test_seeds_and_variants_can_be_added(main, tmp_path):
    few = ("compare", "--name", "some/thing", "--norm", "none", "--model.activation", "relu")
    few += FEW
    assert main(*few, "--vary.model.lr", "0.1", "--seeds", "1")[0] == 0
    more = (*few, "--vary.model.lr", "0.1", "1e30", "--seeds", "2")
    code, out, err = main(*more)
    assert code == 0, err
    assert "[1/4]" not in out
    assert "[2/4] none lr=1e30, seed 0: FAILED: non-finite loss at step" in out
    assert "0 of 2" in out and "4 runs, 2 failed" in out
    assert (tmp_path / "runs/some/thing/model.lr.png").is_file()
    code, again, _ = main(*more)
    assert code == 0 and table_of(again) == table_of(out)


NETWORKS = """\
from torch import nn

from bn_lightning.networks.mlp import MLP as WithNorm


class WithoutNorm(nn.Sequential):
    def __init__(self, in_channels, image_size, num_classes):
        super().__init__(nn.Flatten(), nn.Linear(784, num_classes))
"""


@pytest.mark.parametrize(
    ("arguments", "variant", "reason"),
    [
        (("mlp", "lenet", "--data.resize", "8"), "network=lenet", "Enlarge them"),
        (("mlp", "net"), "network=net", "Unknown network 'net'"),
        (
            ("own_network.WithoutNorm", "--norm", "none", "builtin", "custom"),
            "custom network=own_network.WithoutNorm",
            "WithoutNorm has no norm layer that can be replaced",
        ),
        (
            ("resnet", "mlp", "--model.network_args.depth", "8"),
            "network=mlp",
            "got an unexpected keyword argument 'depth'",
        ),
    ],
)
def test_networks_that_cannot_be_trained_are_refused(main, tmp_path, arguments, variant, reason):
    (tmp_path / "own_network.py").write_text(NETWORKS)
    code, _, err = main("compare", *QUICK, "--vary.model.network", *arguments)
    assert code == 2 and reason in err and len(err.splitlines()) < 25, err
    assert f"The variant '{variant}' cannot be trained:\n" in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_networks_are_compared(tmp_path):
    (tmp_path / "own_network.py").write_text(NETWORKS)
    networks = ("mlp", "own_network.WithNorm")
    arguments = ("compare", "--vary.model.network", *networks, "--seeds", "1", *FEW)
    arguments += ("--vary.model.norm", "custom", "builtin", "--model.network_args.widths", "[8]")
    arguments += ("--trainer.limit_train_batches", "2")
    out = run_here(*arguments, cwd=tmp_path).stdout
    assert out.count("vs custom (95%)") == 5
    assert "--model.network_args.widths '[8]'" in out
    lines = list(csv.DictReader((tmp_path / "runs/compare/runs.csv").open()))
    names = [f"network={network} {norm}" for network in networks for norm in ("custom", "builtin")]
    assert [line["choice"] for line in lines] == names
    # Both networks are the same class, and the norms compute the same.
    losses = [float(line["train loss"]) for line in lines]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
    for line in lines:
        result = json.loads((tmp_path / line["folder"] / "result.json").read_text())
        assert line["choice"] == f"network={result['network']} {result['norm']}"
    # An unfinished run is resumed. The user has typed the import path.
    (tmp_path / lines[2]["folder"] / "result.json").unlink()
    again = run_here(*arguments, cwd=tmp_path).stdout
    assert "[4/4] network=own_network.WithNorm custom" in again and "4 runs, 0 failed" in again


KILLED = """\
import multiprocessing, os, signal
from torch import nn


def norm(num_features, num_dims):
    if os.path.exists("kill") and multiprocessing.parent_process():
        os.kill(os.getpid(), signal.SIGKILL)
    return nn.Identity()
"""


def test_a_killed_run_counts_as_failed_and_is_repeated_by_the_next_command(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    arguments = ("compare", "--norm", "none", "killed.norm", "--seeds", "1", *FEW)
    (tmp_path / "kill").touch()
    out = run_here(*arguments, cwd=tmp_path).stdout
    assert "killed.norm, seed 0: FAILED: The worker process was killed (SIGKILL)" in out
    assert "2 runs, 1 failed" in out
    (tmp_path / "kill").unlink()
    out = run_here(*arguments, cwd=tmp_path).stdout
    assert "[2/2] killed.norm" in out and "2 runs, 0 failed" in out


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_comparison_is_resumed(tmp_path, number):
    arguments = [sys.executable, "-m", "bn_lightning", "compare", "--norm", "none"]
    arguments += ["--seeds", "2", *QUICK]
    arguments += ["--trainer.max_epochs", "8", "--data.batch_size", "32"]
    arguments += ["--trainer.limit_train_batches", "80"]
    process = subprocess.Popen(
        arguments, cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    checkpoint = tmp_path / "runs/compare/none/seed-0/0/checkpoints/last.ckpt"
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.5)
    # A terminal sends Ctrl-C to the whole process group.
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGKILL else 130)
    assert number == signal.SIGKILL or "the same command resumes the study" in out
    end = time.monotonic() + 60
    # Processes of the group that have not exited.
    pgrep = ["pgrep", "-g", str(process.pid), "-r", "R,S,D,T"]
    while subprocess.run(pgrep, stdout=subprocess.DEVNULL).returncode == 0:
        assert time.monotonic() < end, "a worker still runs after its parent has exited"
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "[2/2]" in done.stdout, done.stderr
    result = json.loads((checkpoint.parent.parent / "result.json").read_text())
    assert result["finished"] and result["resumed_at_steps"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--norm", "layers"), "Unknown norm 'layers'"),
        (("--vary.model.lrr", "1"), "Did you mean"),
        (("--seeds", "0"), "--seeds is 0; it must be at least 1"),
        (("--seeds", "many"), "argument --seeds: invalid int value: 'many'"),
        (
            ("--model.norm=custom", "--norm", "none"),
            "--model.norm cannot be used together with --norm",
        ),
        (("--vary.seed_everything", "1", "2"), "seed_everything cannot be varied"),
        (("--trainer.devices", "2"), "Each run of a study uses one process"),
        (("--vary.config", "a/x.yaml", "b/x.yaml"), "Two variants have the name 'x'"),
        (("--config", "nowhere.yaml"), "nowhere.yaml"),
        (("--ckpt_path", "last"), "--ckpt_path cannot be used in a study"),
        (("--trainer.fast_dev_run", "true"), "--trainer.fast_dev_run and"),
        (("--data.source", "elsewhere"), "elsewhere"),
    ],
)
def test_mistakes_are_reported_before_any_run(main, tmp_path, arguments, message):
    code, _, err = main("compare", *QUICK, *arguments)
    assert code == 2 and message in err and len(err.splitlines()) < 25, err
    assert not (tmp_path / "runs").exists()


def test_runs_of_other_code_are_reported_and_trained_again_on_request(tmp_path):
    (tmp_path / "own_norm.py").write_text("from own_formula import norm\n")
    formula = tmp_path / "own_formula.py"
    formula.write_text("from torch import nn\n\n\ndef norm(**_):\n    return nn.Identity()\n")
    arguments = ("compare", "--norm", "none", "own_norm.norm", "--seeds", "1", *FEW)
    out = run_here(*arguments, cwd=tmp_path).stdout
    assert "stale" not in out

    formula.write_text(formula.read_text().replace("nn.Identity()", "nn.Hardtanh(-1, 1)"))
    reason = "stale: own_norm.norm, seed 0: the source of own_formula has changed\n"
    out = run_here(*arguments, cwd=tmp_path).stdout
    assert out.count(reason) == 1 and "1, 1 stale" in out and "[" not in out
    folder = tmp_path / "runs/compare"
    assert reason in (folder / "table.txt").read_text()
    lines = list(csv.DictReader((folder / "runs.csv").open()))
    assert [line["stale"] for line in lines] == ["", "the source of own_formula has changed"]

    out = run_here(*arguments, "--rerun", "stale", cwd=tmp_path).stdout
    assert "[2/2] own_norm.norm" in out and "stale" not in out
    before, now = (
        json.loads((folder / "own_norm.norm/seed-0" / run / "result.json").read_text())
        for run in ("stale/0", "0")
    )
    assert (
        before["train_loss"]
        != now["train_loss"]
        == float(list(csv.DictReader((folder / "runs.csv").open()))[1]["train loss"])
    )
    # A study of an earlier version has no record. An unfinished run is not mixed with other code.
    (folder / "none/seed-0/0/code.json").unlink()
    (folder / "own_norm.norm/seed-0/0/code.json").unlink()
    (folder / "own_norm.norm/seed-0/0/result.json").unlink()
    out = run_here(*arguments, cwd=tmp_path).stdout
    assert out.count("stale: none, seed 0: its code was not recorded") == 2
    assert "[2/2] own_norm.norm" in out and "2 runs, 0 failed" in out
    result = json.loads((folder / "own_norm.norm/seed-0/0/result.json").read_text())
    assert not result["resumed_at_steps"]
