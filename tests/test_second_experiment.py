"""All commands with another project: a table, no classes, no images, a metric to minimize.

The project is tests/projects/friedman. The package does not refer to it. Its data are tensors;
tests/test_own_task.py has a project with a Dataset, which is killed and trained by two processes.
"""

import json
from pathlib import Path

import pytest
import torch
import yaml
from scipy import stats

from tests.conftest import PROJECTS, run_here

EXPERIMENT = "friedman.experiment:EXPERIMENT"
BEST = "runs/friedman/0/checkpoints/best.ckpt"


@pytest.fixture
def friedman(tmp_path, monkeypatch):
    """Return a function that runs a command of the project in this process, in an empty folder.

    `friedman(*arguments)` returns (exit code, stdout, stderr).
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(PROJECTS)

    def run(*arguments):
        done = run_here(*arguments, cwd=Path.cwd(), check=False, module="friedman")
        return done.returncode, done.stdout, done.stderr

    return run


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def test_fit_test_and_inspect(friedman, tmp_path):
    code, out, err = friedman("fit")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("Perceptron, 449 parameters, on cpu")
    assert lines[1] == "Friedman's problem, 1,000 rows, validated on held-out training samples"
    epochs = [line for line in lines if line.startswith("epoch  ")]
    assert len(epochs) == 3
    assert all(f"{m} " in epochs[0] for m in ("train rmse", "train r2", "val loss", "val rmse"))
    assert "samples/s" in epochs[0]
    assert "No table of classes: this task has no classes." in out
    assert "this task has no classes" in out and "Traceback" not in err

    result = result_of(tmp_path / "runs/friedman/0")
    best = min(result["val_rmse_final"], result["val_rmse_best"])
    assert result["val_rmse"] == result["val_rmse_best"] == best
    # The error of the selected network on the test rows, computed without the package's metrics.
    from friedman.experiment import Regression, Table

    model = Regression.load_from_checkpoint(tmp_path / BEST, weights_only=True).eval()
    inputs, targets = Table().test_samples()
    with torch.no_grad():
        rmse = (model(inputs) - targets).square().mean().sqrt().item()
    assert result["test_rmse"] == pytest.approx(rmse, rel=1e-5)
    assert 1 < rmse < targets.std()  # between the noise and the mean

    code, out, err = friedman("test", "--ckpt_path", BEST)
    assert code == 0, err
    assert f"test_rmse  {rmse:.4f}" in out

    code, out, err = friedman("inspect", BEST)
    assert code == 0, err
    assert "best validation" in out and f"rmse {best:.3f}" in out
    code, out, _ = friedman("inspect", "--run", "runs/friedman/0", "--json")
    found = json.loads(out)
    assert found["settings"]["model.optimizer"] == "AdamW"
    assert "data.folder" not in found["settings"]  # a machine setting
    assert list(found["norms"]) == ["1"]
    assert found["data"] == {"source": "formula", "sha256": {"table": result["sha256_table"]}}


def test_export_of_a_table(friedman, tmp_path):
    assert friedman("fit")[0] == 0
    code, out, err = friedman("export", BEST, "table.pt2")
    assert code == 0, err
    assert "1 is folded into 0" in out and "test rmse" in out


def test_predict_needs_classes(friedman):
    assert friedman("fit", "--trainer.max_epochs", 1)[0] == 0
    code, _, err = friedman("predict", "--ckpt_path", BEST)
    assert (code, err) == (2, "error: predict cannot be used: this task has no classes.\n")


def test_errors_name_the_program_of_the_project(friedman):
    code, _, err = friedman("fit", "--model.widht", 8)
    assert code == 2
    assert "Did you mean --model.width" in err
    assert "All settings: python -m friedman fit --help" in err
    code, _, err = friedman("test")
    assert code == 2 and "runs/friedman/0/checkpoints" in err


def test_config_and_flags_override_defaults_of_the_experiment(friedman, tmp_path):
    (tmp_path / "c.yaml").write_text("model:\n  lr: 0.02\n  width: 8\n")
    assert friedman("fit", "--config", "c.yaml", "--model.width", 4)[0] == 0
    config = yaml.safe_load((tmp_path / "runs/friedman/0/config.yaml").read_text())
    assert config["trainer"]["max_epochs"] == 3
    assert config["data"]["batch_size"] == 64
    assert (config["model"]["lr"], config["model"]["width"]) == (0.02, 4)


def test_a_run_is_not_resumed_with_other_rows(friedman):
    assert friedman("fit", "--trainer.max_steps", 20)[0] == 0
    again = ("fit", "--resume", "runs/friedman/0", "--trainer.max_steps", 40)
    code, _, err = friedman(*again, "--data.rows", 999)
    assert code == 2
    assert "was trained on other data (source formula)" in err and "--data.rows 1000" in err


def test_compare_has_a_metric_to_minimize_and_folds(friedman, tmp_path):
    arguments = ("compare", "--vary.model.width", 4, 32, "--trainer.max_epochs", 6)
    arguments += ("--trainer.accelerator", "cpu", "--vary.data.fold", 0, 2)
    code, out, err = friedman(*arguments)
    assert code == 0, err
    assert "4 runs, 0 failed" in out
    assert "[3/4] width=4, seed 0, fold 2: " in out
    assert "note: means, intervals and d are over 2 folds." in out
    heads = [line.split("  ")[0] for line in out.splitlines()]
    assert {"train loss", "val rmse", "test rmse", "samples per second"} <= set(heads)
    table = json.loads((tmp_path / "runs/compare/table.json").read_text())
    # Each run has reached the threshold, or its final error is above it.
    [steps] = [name for name in table["runs"][0] if name.startswith("steps to ")]
    threshold = float(steps.removeprefix("steps to "))
    for run in table["runs"]:
        assert run[steps] is not None or run["val rmse"] > threshold
        # A fold is no variant. All variants have the same folds.
        [folder] = (tmp_path / "runs/compare").glob(
            f"{run['choice']}/seed-0/fold-{run['data.fold']}/0"
        )
        assert folder == tmp_path / run["folder"]
        settings = yaml.safe_load((folder / "config.yaml").read_text())
        assert settings["data"]["fold"] == int(run["data.fold"])
    keys = [(run["choice"], run["seed"], run["data.fold"]) for run in table["runs"]]
    assert keys == [(f"width={width}", 0, fold) for fold in ("0", "2") for width in (4, 32)]
    errors = [run["test rmse"] for run in table["runs"]]
    reference = stats.ttest_rel(errors[1::2], errors[::2])
    row = next(
        row for row in table["rows"] if (row["figure"], row["choice"]) == ("test rmse", "width=32")
    )
    assert row["pairs"] == 2
    ends = reference.confidence_interval(0.95)
    assert (row["compared_low"], row["compared_high"]) == pytest.approx(tuple(ends))

    again = friedman(*arguments)[1]
    assert "[" not in again and again == out[out.index("train loss  ") :]
    code, _, err = friedman(*arguments[:-3], "--data.fold", 0)
    assert code == 2 and "--data.fold was varied and is now 0" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--vary.data.fold", 1, 3, "--vary.model.width", 4, 8),
            "The variant 'width=4', seed 0, fold 3, cannot be trained:\n",
        ),
        (("--vary.data.fold", 1, "01"), "Two of the values of --vary.data.fold are the same"),
        (("--ablate.data.fold", 1), "Use --vary.data.fold"),
    ],
)
def test_wrong_folds_are_refused_before_any_run(friedman, tmp_path, arguments, message):
    code, _, err = friedman("compare", *arguments)
    assert code == 2 and message in err, err
    assert not (tmp_path / "runs").exists()


def test_folds_are_not_searched(friedman, tmp_path):
    (tmp_path / "sweep.yaml").write_text("sweep: {space: {data.fold: [0, 1]}}\n")
    code, _, err = friedman("sweep", "--config", "sweep.yaml")
    assert code == 2 and "data.fold cannot be searched" in err, err
    assert not (tmp_path / "runs").exists()


def test_sweep_minimizes(friedman, tmp_path):
    (tmp_path / "sweep.yaml").write_text(
        "sweep:\n  trials: 2\n  sampler: random\n  pruner: none\n"
        "  space:\n    model.lr: [1.0e-6, 0.03]\n"
    )
    settings = ("sweep", "--config", "sweep.yaml", "--trials", 4, "--trainer.accelerator", "cpu")
    code, _, err = friedman(*settings)
    assert code == 0, err
    winner = yaml.safe_load((tmp_path / "runs/sweep/winner.yaml").read_text())
    rows = (tmp_path / "runs/sweep/trials.csv").read_text().splitlines()
    values = [float(row.split(",")[2]) for row in rows[1:]]
    assert values[0] == min(values)
    if any(",0.03," in row for row in rows):
        assert winner["model"]["lr"] == 0.03
