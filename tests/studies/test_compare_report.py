"""The output files of `compare`, written from given runs."""

import csv
import json
from dataclasses import replace

import pytest
from PIL import Image

from bn_lightning.studies import compare_report
from bn_lightning.studies.repetitions import Repetition
from bn_lightning.studies.statistics import Run, Selection
from bn_lightning.studies.variants import Variant

SHARED = {"model.network": "mlp", "model.network_args": {"widths": [8]}}
MIN = Selection("val_rmse", "min")
VARIANTS = [Variant(f"lr={lr}", "lr=1", (), (("model.lr", lr),)) for lr in ("1", "2")]


def run(variant, seed, error):
    result = {"train_loss": error, "val_rmse": error, "test_rmse": 2 * error}
    result |= {"images_per_second": 1_000.0, "val_images_from": "training set"}
    validations = [{"step": 10 * n, "val_rmse": error * 4 / n} for n in (1, 2, 4)]
    return Run(
        variant,
        Repetition(seed),
        f"{variant}/{seed}",
        None,
        result,
        [{"train_loss": 1.0}],
        validations,
    )


@pytest.fixture
def written(tmp_path, capsys):
    """The folder of a report, and the printed text."""
    runs = [run("lr=1", 0, 2.0), run("lr=2", 0, 1.0), run("lr=1", 1, 2.5)]
    runs.append(Run("lr=2", Repetition(1), "lr=2/1", "non-finite loss at step 3, epoch 1"))
    compare_report.write(tmp_path, runs, VARIANTS, MIN, None, SHARED)
    return tmp_path, capsys.readouterr().out


def test_tables_are_printed_and_written(written):
    folder, out = written
    text = (folder / "table.txt").read_text()
    assert out.startswith(text)
    heads = [line.split("  ")[0] for line in text.splitlines()]
    shown = ("train loss", "val rmse", "test rmse", "steps to 2.300", "samples per second")
    assert [head for head in heads if head in shown] == list(shown)
    failure = "lr=2, seed 1: non-finite loss at step 3, epoch 1 (lr=2/1)"
    assert f"failed: {failure}\n" in text
    assert f"- failed: {failure}" in (folder / "table.md").read_text()
    head = "| test rmse | n | mean ± sd | 95% interval | vs lr=1 (95%) | d |"
    assert head in (folder / "table.md").read_text()
    shared = "all runs: --model.network mlp --model.network_args.widths '[8]'\n"
    assert shared in text and shared in (folder / "table.md").read_text()
    assert f"4 runs, 1 failed. Tables and plots are in {folder}" in out


def test_the_columns_of_csv_and_json_files(written):
    folder, _ = written
    rows = list(csv.DictReader((folder / "table.csv").open()))
    assert list(rows[0])[:3] == ["figure", "choice", "runs"] and rows[0]["held_by"] == "difference"
    runs = list(csv.DictReader((folder / "runs.csv").open()))
    assert list(runs[0])[:5] == ["choice", "seed", "folder", "failure", "train loss"]
    assert [line["steps to 2.300"] for line in runs] == ["40", "20", "", ""]
    data = json.loads((folder / "table.json").read_text())
    assert data["settings"] == SHARED
    assert [line["choice"] for line in data["runs"]] == ["lr=1", "lr=2", "lr=1", "lr=2"]
    [row] = [r for r in data["rows"] if (r["figure"], r["choice"]) == ("test rmse", "lr=2")]
    assert (row["mean"], row["compared"], row["failed"]) == (2.0, -2.0, 1)


def test_a_given_threshold_is_used(tmp_path):
    compare_report.write(tmp_path, [run("lr=1", 0, 2.0)], VARIANTS[:1], MIN, 4.5, {})
    [line] = csv.DictReader((tmp_path / "runs.csv").open())
    assert line["steps to 4.500"] == "20"


@pytest.mark.parametrize(("seeds", "shown"), [(1, "n = 1: one run"), (2, "n = 2: with"), (5, None)])
def test_notes_say_which_epoch_is_reported_and_warn_of_few_runs(tmp_path, capsys, seeds, shown):
    runs = [run("lr=1", seed, 2.0 + seed) for seed in range(seeds)]
    for one in runs:
        one.result["tested"] = "best.ckpt"
    compare_report.write(tmp_path, runs, VARIANTS[:1], MIN, None, {})
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert notes[0] == (
        "note: val rmse and test rmse are those of the checkpoint with the best val rmse. "
        "train loss is that of the last epoch."
    )
    assert "derived from the last validation of the worst variant" in notes[1]
    assert all(note in (tmp_path / "table.md").read_text() for note in notes)
    assert len(notes) == 2 + (shown is not None)
    assert shown is None or notes[2].startswith(f"note: {shown}")


def test_folds_are_named_and_are_not_called_independent(tmp_path, capsys):
    folds = [Repetition(0, (("data.fold", fold),)) for fold in "012"]
    runs = [replace(run("lr=1", 0, 2.0 + n), repetition=one) for n, one in enumerate(folds)]
    runs[1] = replace(runs[1], failure="NaN")
    runs[0] = replace(runs[0], stale="other code")
    runs[2] = replace(runs[2], stale="other code")
    compare_report.write(tmp_path, runs, VARIANTS[:1], MIN, None, {})
    out = capsys.readouterr().out
    assert "failed: lr=1, seed 0, fold 1: NaN" in out
    assert "stale: lr=1, seed 0, fold 0, 2: other code\n" in out
    assert "d are over 3 folds. Runs that share training samples, as folds do, are not" in out
    assert "n = 2: " in out and "Use more values of --vary.data.fold." in out
    lines = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert list(lines[0])[:4] == ["choice", "seed", "data.fold", "folder"]
    assert [line["data.fold"] for line in lines] == ["0", "1", "2"]


def test_plots_are_written(written):
    for name in ("curves", "model.lr"):
        with Image.open(written[0] / f"{name}.png") as picture:
            assert len(picture.convert("L").getcolors(256)) > 20


def test_a_plot_that_fails_is_one_line(tmp_path, capsys):
    # A lone `$` makes matplotlib read the name as a formula, and this one is invalid.
    name = r"a=$\frac$ lr=1"
    variant = Variant(name, name, (), (("model.lr", "1"),))
    compare_report.write(tmp_path, [run(name, 0, 2.0)], [variant], MIN, None, {})
    captured = capsys.readouterr()
    assert "1 runs, 0 failed." in captured.out
    [line] = captured.err.splitlines()
    assert line.startswith("WARNING: curves.png cannot be drawn: ValueError")
