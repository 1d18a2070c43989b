"""Each command from the outside: what people type, what they see, what is left."""

import csv
import http.server
import io
import json
import pickle
import shutil
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch

from bn_lightning import terminal
from bn_lightning.data import sources
from bn_lightning.data.fashion_mnist import CLASSES
from tests.conftest import QUICK, assert_same_weights, command, on_cpu, weights


def result(folder):
    return json.loads((folder / "result.json").read_text())


def test_config_reruns_the_run_bit_for_bit(trained, tmp_path):
    folder, _ = trained
    command("fit", "--config", folder / "config.yaml", cwd=tmp_path)
    again = tmp_path / "runs" / "lenet" / "0"
    assert_same_weights(folder / "checkpoints" / "last.ckpt", again / "checkpoints" / "last.ckpt")
    measured = ("images_per_second", "train_seconds", "commit")
    one, other = ({k: v for k, v in result(f).items() if k not in measured} for f in (folder, again))
    assert one == other


def test_test_needs_nothing_but_the_checkpoint(trained, main):
    folder, _ = trained
    code, out, _ = main("test", "--ckpt_path", folder / "checkpoints" / "best.ckpt", "--trainer.accelerator", "cpu")
    assert code == 0
    assert out.splitlines()[1].split() == ["test_acc", f"{result(folder)['test_acc']:.4f}"]
    _, *classes = out[out.index("class  ") :].splitlines()
    assert [line[:11].strip() for line in classes] == list(CLASSES)
    accuracies = [float(line[11:].split()[0]) for line in classes]
    assert sum(accuracies) / 10 == pytest.approx(result(folder)["test_acc"], abs=1e-3)  # as many images in each


def test_what_a_class_is_taken_for(capsys):
    counts = torch.tensor([[90, 4, 6], [0, 100, 0], [0, 0, 0]])
    terminal.print_classes(counts, ["coat", "dress", "bag"])
    _, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert rows == [["coat", "0.900", "bag", "(6.0%)"], ["dress", "1.000"], ["bag", "none"]]


def test_validate(trained, main):
    folder, _ = trained
    code, out, _ = main("validate", "--ckpt_path", folder / "checkpoints" / "best.ckpt")
    assert code == 0
    assert f"{result(folder)['val_acc']:.4f}" in out


def test_predict(trained, main):
    folder, _ = trained
    given = ("predict", "--ckpt_path", folder / "checkpoints" / "best.ckpt")
    code, out, _ = main(*given, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0
    assert len(rows) == 1_000
    labels = sources.load("sample").test_labels.tolist()
    assert [row["truth"] for row in rows] == [CLASSES[label] for label in labels]
    right = sum(row["class"] == row["truth"] for row in rows)
    assert right / 1_000 == pytest.approx(result(folder)["test_acc"])
    assert all(0.1 <= float(row["probability"]) >= float(row["runner_up_probability"]) for row in rows)
    assert all(row["class"] != row["runner_up"] in CLASSES for row in rows)
    code, out, _ = main(*given, "--format", "json")
    assert [{name: str(value) for name, value in row.items()} for row in json.loads(out)] == rows
    code, out, _ = main(*given)
    assert len(out.splitlines()) == 1_001
    assert " ".join(out.splitlines()[0].split()) == "image truth class p runner-up p"


def test_predict_only_some_images(main, trained):
    given = ("predict", "--ckpt_path", trained[0] / "checkpoints" / "best.ckpt", "--format", "csv")
    for flags, rows in ((("--trainer.limit_predict_batches", 1), 256), (("--trainer.fast_dev_run", "true"), 256)):
        code, out, err = main(*given, *flags)
        assert (code, len(out.splitlines())) == (0, rows + 1), err
    code, _, err = main(*given, "--trainer.limit_predict_batches", 0)
    assert code == 2 and "There is no image to predict" in err


def test_predict_draws_its_answers(main, trained, tmp_path):
    given = ("predict", "--ckpt_path", trained[0] / "checkpoints" / "best.ckpt", "--format", "csv")
    code, _, err = main(*given, "--grid", "grid.jpg")
    assert (code, err) == (0, "grid.jpg has the first 400 of 1,000 images\n")
    assert (tmp_path / "grid.jpg").stat().st_size > 100_000
    for wrong, reason in (("grid.nix", "names no kind of picture: --grid grid.png"), ("nowhere/grid.png", "no folder")):
        code, out, err = main(*given, "--grid", wrong)
        assert (code, out) == (2, "")
        assert reason in err
    code, _, err = main(*given, "--format", "xml")
    assert code == 2
    assert "xml" in err and "csv" in err


@pytest.mark.parametrize("form", ["csv", "table"])
def test_what_reads_may_stop_reading(trained, tmp_path, form):
    given = [sys.executable, "-m", "bn_lightning", "predict", "--format", form]
    given += ["--ckpt_path", trained[0] / "checkpoints" / "best.ckpt"]
    with subprocess.Popen(given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_a_fit_that_nobody_reads_leaves_no_word(tmp_path):
    given = [sys.executable, "-m", "bn_lightning", *on_cpu(("fit", *QUICK))]
    with subprocess.Popen(given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as process:
        process.stdout.readline()
        process.stdout.close()
        assert b"cannot go on" not in process.stderr.read()
    assert process.returncode == 141


def test_where_nothing_is_written_for_tensorboard_nothing_points_to_it(main):
    for flags in (("--trainer.logger", "false"), ("--trainer.fast_dev_run", "true")):
        code, out, _ = main("fit", *QUICK, *flags)
        assert code == 0 and "tensorboard" not in out


def test_a_checkpoint_remembers_and_flags_win(main, tmp_path):
    """Order of strength: defaults, the checkpoint, --config, flags."""
    remembered = ("--model.norm", "builtin", "--model.norm_args.eps", "1e-3", "--model.activation", "relu",
                  "--data.batch_size", "128", "--seed_everything", "7")  # fmt: skip
    assert main("fit", *QUICK, *remembered, "--trainer.limit_train_batches", 2, "--trainer.max_epochs", 1)[0] == 0
    checkpoint = tmp_path / "runs" / "lenet" / "0" / "checkpoints" / "last.ckpt"
    (tmp_path / "own.yaml").write_text("data:\n  batch_size: 64\nmodel:\n  lr: 0.5\n")
    own = (
        "--config",
        "own.yaml",
        "--model.lr",
        "0.25",
        "--trainer.max_epochs",
        "2",
        "--trainer.limit_train_batches",
        2,
    )
    assert main("fit", "--ckpt_path", checkpoint, *own)[0] == 0
    settings = torch.load(tmp_path / "runs/lenet/0/checkpoints/last.ckpt", weights_only=True)
    model, data = settings["hyper_parameters"], settings["datamodule_hyper_parameters"]
    assert (model["norm"], model["norm_args"], model["activation"]) == ("builtin", {"eps": 1e-3}, "relu")
    assert (data["source"], data["seed"]) == ("sample", 7)
    assert (data["batch_size"], model["lr"]) == (64, 0.25)


def test_a_learning_rate_that_is_typed_beats_the_one_in_the_checkpoint(main, trained, tmp_path):
    last = trained[0] / "checkpoints" / "last.ckpt"
    flags = ("--trainer.max_epochs", 3, "--trainer.limit_train_batches", 2, "--model.lr", "0.125")
    assert main("fit", "--ckpt_path", last, *flags)[0] == 0
    resumed = torch.load(tmp_path / "runs/lenet/0/checkpoints/last.ckpt", weights_only=True)
    assert resumed["optimizer_states"][0]["param_groups"][0]["lr"] == 0.125


def test_after_a_resume_the_figures_are_those_of_the_weights_that_were_tested(main, trained, tmp_path):
    last = trained[0] / "checkpoints" / "last.ckpt"
    flags = ("--trainer.max_epochs", 3, "--trainer.limit_train_batches", 2, "--model.lr", "100")  # spoils them
    assert main("fit", "--ckpt_path", last, *flags)[0] == 0
    folder = tmp_path / "runs" / "lenet" / "0"
    _, out, _ = main("validate", "--ckpt_path", folder / "checkpoints" / "best.ckpt")
    assert f"val_acc    {result(folder)['val_acc']:.4f}" in out
    assert main("fit", "--ckpt_path", last, "--trainer.max_epochs", 2)[0] == 0  # nothing left to do
    assert result(tmp_path / "runs" / "lenet" / "1")["tested"].endswith("best.ckpt")


def test_code_that_only_a_checkpoint_names_is_not_run(main, trained, tmp_path):
    """An import path in a checkpoint could name anything that is installed: it has to be typed too."""
    (tmp_path / "trap.py").write_text("open('sprung', 'w')\nfrom bn_lightning import BatchNorm as Norm\n")
    checkpoint = torch.load(trained[0] / "checkpoints" / "best.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["norm"] = "trap.Norm"
    torch.save(checkpoint, tmp_path / "trap.ckpt")
    code, _, err = main("test", "--ckpt_path", "trap.ckpt")
    assert code == 2
    assert "name it yourself: --model.norm trap.Norm" in err
    assert not (tmp_path / "sprung").exists()
    assert main("test", "--ckpt_path", "trap.ckpt", "--model.norm", "trap.Norm")[0] == 0


def test_predict_is_refused_in_several_processes(main, trained):
    code, out, err = main("predict", "--ckpt_path", trained[0] / "checkpoints" / "best.ckpt", "--trainer.devices", 2)
    assert (code, out) == (2, "")
    assert "--trainer.devices 1" in err


def test_without_validation_images_nothing_is_selected(main, tmp_path):
    code, out, _ = main("fit", *QUICK, "--data.val_images", 0)
    assert code == 0
    assert "of the test set, and selects nothing" in out
    assert "val acc" not in out
    assert "test acc after each epoch: final" in out
    folder = tmp_path / "runs" / "lenet" / "0"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["last.ckpt"]
    assert result(folder)["val_acc"] == result(folder)["test_acc"] == result(folder)["val_acc_final"]
    assert result(folder)["val_images_from"] == "test set"


def test_a_norm_of_the_users_own(main, tmp_path):
    (tmp_path / "own_norms.py").write_text(
        "from torch import nn\n\n\ndef group_norm(num_features, num_dims, num_groups=2):\n"
        "    return nn.GroupNorm(num_groups, num_features)\n"
    )
    chosen = ("--model.norm", "own_norms.group_norm", "--model.norm_args.num_groups", "1")
    assert main("fit", *QUICK, *chosen, "--trainer.max_epochs", 1)[0] == 0
    assert result(tmp_path / "runs" / "lenet" / "0")["norm"] == "own_norms.group_norm"


@pytest.mark.parametrize(
    "flags",
    [
        ["--trainer.fast_dev_run", "true"],
        ["--trainer.logger", "false"],
        ["--trainer.enable_checkpointing", "false"],
        ["--trainer.limit_val_batches", "0"],
        ["--trainer.overfit_batches", "2"],
        ["--trainer.max_epochs", "-1", "--trainer.max_steps", "3"],
        ["--trainer.check_val_every_n_epoch", "2"],
        ["--trainer.val_check_interval", "7"],
        ["--trainer.accumulate_grad_batches", "4"],
        ["--trainer.profiler", "simple"],
        ["--trainer.precision", "64-true"],
        ["--trainer.enable_progress_bar", "true"],
    ],
    ids=lambda flags: " ".join(flags),
)
def test_trainer_flags_break_neither_the_closing_test_nor_the_records(main, tmp_path, flags):
    code, out, err = main("fit", *QUICK, *flags)
    assert code == 0, err
    assert "gamma of the first norm layer" in out
    found = result(tmp_path / "runs" / "lenet" / "0")
    assert 0 <= found["test_acc"] <= 1
    assert found["images_per_second"] > 0
    if "fast_dev_run" in flags[0] or "enable_checkpointing" in flags[0]:
        assert found["tested"] == "the weights in memory"
        assert not (tmp_path / "runs" / "lenet" / "0" / "checkpoints").exists()


def test_precision_that_was_really_used_is_recorded(main, tmp_path):
    assert main("fit", *QUICK, "--trainer.precision", "16-mixed", "--trainer.max_epochs", 1)[0] == 0
    assert result(tmp_path / "runs" / "lenet" / "0")["precision"] == "bf16-mixed"


def test_two_processes(tmp_path):
    done = command("fit", *QUICK, "--trainer.devices", "2", cwd=tmp_path)
    folder = tmp_path / "runs" / "lenet" / "0"
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("**/0")] == ["runs/lenet/0"]
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]  # the second process writes nothing of its own
    found = result(folder)
    assert (found["processes"], found["steps"]) == (2, 44)
    assert round(found["test_acc"] * 1_000, 3) == int(found["test_acc"] * 1_000 + 0.5)  # each of 1,000 counted once
    assert found["train_loss"] < 1.5
    assert done.stdout.count("epoch  ") == 2
    alone = command("test", "--ckpt_path", folder / "checkpoints" / "best.ckpt", cwd=tmp_path)
    assert f"{found['test_acc']:.4f}" in alone.stdout


WRONG = {
    "norm": (["--model.norm", "batch"], ["'batch'", "custom, builtin, article, renorm, group, none"]),
    "norm argument": (["--model.norm_args.epsilon", "1"], ["epsilon", "eps"]),
    "flag": (["--model.nrom", "custom"], ["--model.nrom", "Did you mean --model.norm"]),
    "choice": (["--model.activation", "rleu"], ["rleu", "'relu'"]),
    "type": (["--data.batch_size", "many"], ["data.batch_size", "many"]),
    "value": (["--data.batch_size", "0"], ["batch_size is 0", "at least 1"]),
    "seed": (["--seed_everything", "-1"], ["--seed_everything is -1", "from 0 to 4294967295"]),
    "folder": (["--data.source", "nowhere"], ["'nowhere'", "auto, system, download, sample"]),
    "half a file": (["--data.source", "half"], ["train-labels-idx1-ubyte", "60,008 bytes"]),
    "config": (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
    "key in a config": (["--config", "wrong.yaml"], ["nrom"]),
    "checkpoint": (["--ckpt_path", "nowhere.ckpt"], ["'nowhere.ckpt'", "runs/NAME/N/checkpoints"]),
    "no checkpoint": (["--ckpt_path", "wrong.yaml"], ["'wrong.yaml' is not a checkpoint"]),
    "half a checkpoint": (["--ckpt_path", "half.ckpt"], ["'half.ckpt' is not a checkpoint"]),
    "not a run": (["--ckpt_path", "tensor.ckpt"], ["'tensor.ckpt' holds no run"]),
    "foreign checkpoint": (["--ckpt_path", "foreign.ckpt"], ["'foreign.ckpt'", "hidden"]),
    "strategy": (["--trainer.strategy", "ddp_spawn"], ["ddp_spawn", "--trainer.strategy ddp "]),
    "barebones": (["--trainer.barebones", "true"], ["--trainer.barebones true", "--trainer.logger false"]),
    "optimizer": (["--model.optimizer", "Adan"], ["'Adan'", "AdamW"]),
    "accelerator": (["--trainer.accelerator", "tpu"], ["tpu", "Accelerators of this machine: cpu"]),
}


@pytest.mark.parametrize("what", WRONG)
def test_mistakes_give_one_screen_and_leave_nothing(main, trained, tmp_path, what):
    (tmp_path / "wrong.yaml").write_text("model:\n  nrom: custom\n")
    (tmp_path / "half.ckpt").write_bytes((trained[0] / "checkpoints" / "last.ckpt").read_bytes()[:100_000])
    torch.save(torch.zeros(3), tmp_path / "tensor.ckpt")
    torch.save({"state_dict": {}, "hyper_parameters": {"hidden": 3}}, tmp_path / "foreign.ckpt")
    (tmp_path / "half").mkdir()
    for file in sources.WHOLE:
        (tmp_path / "half" / file.name).write_bytes(b"\0\0\x08" + bytes([len(file.shape)]) + b"\0" * 1_000)
    if (first := tmp_path / "half" / sources.TRAIN_IMAGES).exists() and sources.SYSTEM.is_dir():
        first.unlink()  # this one whole, so that the next is what is found
        (tmp_path / "half" / f"{first.name}.gz").symlink_to(sources.SYSTEM / f"{first.name}.gz")
    elif what == "half a file":
        pytest.skip(f"needs all of Fashion-MNIST in {sources.SYSTEM}")
    before = sorted(tmp_path.rglob("*"))
    flags, said = WRONG[what]
    code, _, err = main("fit", *flags)
    assert code == 2
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 24
    for words in said:
        assert words in err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_network_that_does_not_fit_the_checkpoint(main, trained):
    code, _, err = main("test", "--ckpt_path", trained[0] / "checkpoints" / "best.ckpt", "--model.norm", "none")
    assert code == 2
    assert "does not fit the network" in err
    assert "Traceback" not in err


def test_no_folder_for_the_run(main, tmp_path):
    (tmp_path / "runs").write_text("a file")
    code, _, err = main("fit", *QUICK)
    assert code == 2
    assert "runs" in err
    assert "--trainer.default_root_dir" in err


@pytest.mark.parametrize("name", ["test", "validate", "predict"])
def test_a_command_that_needs_a_checkpoint_says_so(main, name):
    code, _, err = main(name)
    assert code == 2
    assert f"{name} needs a checkpoint: --ckpt_path" in err


class Bomb:
    def __reduce__(self):
        return open, ("exploded", "w")


@pytest.fixture
def served(tmp_path):
    """A folder, and its address on loopback."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["fit", "test"])
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_bomb_is_refused_without_running(main, served, tmp_path, name, writer):
    folder, address = served
    content = {"state_dict": {}, "hyper_parameters": Bomb()}
    if writer == "torch":
        torch.save(content, folder / "bomb.ckpt")
    else:
        (folder / "bomb.ckpt").write_bytes(pickle.dumps(content))
    for path in (folder / "bomb.ckpt", f"{address}/bomb.ckpt"):
        code, _, err = main(name, "--ckpt_path", path)
        assert code == 2
        assert "nothing in it was executed" in err
    assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(content))
    assert (tmp_path / "exploded").exists()  # the bomb itself works


def test_a_checkpoint_by_address(main, trained, served):
    folder, address = served
    shutil.copy(trained[0] / "checkpoints" / "best.ckpt", folder)
    code, out, err = main("test", "--ckpt_path", f"{address}/best.ckpt")
    assert code == 0, err
    assert f"{result(trained[0])['test_acc']:.4f}" in out


def test_without_a_network_and_without_data_the_sample_is_used(tmp_path):
    """A process with no network but a dead loopback, and no system copy: the main job still has real data."""
    hide = f"mount -t tmpfs none {sources.SYSTEM.parent} && " if sources.SYSTEM.is_dir() else ""
    isolated = ["unshare", "--net", "--mount", "sh", "-c"]
    try:
        possible = subprocess.run([*isolated, hide + "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        possible = False
    if not possible:
        pytest.skip("needs network and mount namespaces (Linux, root)")
    job = f"{sys.executable} -m bn_lightning fit --trainer.max_epochs 1"
    done = subprocess.run([*isolated, hide + job], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "THIS RUN USES THE PACKAGED SAMPLE" in done.stderr
    found = result(tmp_path / "runs" / "lenet" / "0")
    assert found["data_source"] == "sample"
    assert found["test_acc"] > 0.2
    assert weights(tmp_path / "runs/lenet/0/checkpoints/last.ckpt")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_and_eager_runs_interchange_checkpoints(tmp_path):
    command("fit", *QUICK, "--name", "eager", cwd=tmp_path)
    command("fit", *QUICK, "--name", "compiled", "--model.compile", "true", cwd=tmp_path)
    eager, compiled = (tmp_path / f"runs/{name}/0/checkpoints/last.ckpt" for name in ("eager", "compiled"))
    assert weights(eager).keys() == weights(compiled).keys()
    figures = [
        command(
            "test", "--data.source", "sample", "--ckpt_path", checkpoint, "--model.compile", compile, cwd=tmp_path
        ).stdout
        for checkpoint in (eager, compiled)
        for compile in ("false", "true")
    ]
    assert figures[0] == figures[1] != ""
    assert figures[2] == figures[3] != ""


@pytest.mark.skipif(sys.platform == "win32", reason="another compiler there")
def test_without_a_compiler_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    done = command("fit", *QUICK, "--model.compile", "true", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "C++ compiler" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs/lenet/0").exists()
