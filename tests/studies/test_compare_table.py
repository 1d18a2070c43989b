"""Cells, headers and formats of the tables of `compare`."""

from bn_lightning.studies.compare_table import as_csv, cells, header, markdown
from bn_lightning.studies.repetitions import Repetition
from bn_lightning.studies.statistics import Run
from tests.studies.test_statistics import of, runs, table


def test_a_difference_has_a_sign_and_an_interval():
    [first, second] = [cells(row, 4) for row in table(runs())[:2]]
    assert first == ["a", "4", "0.2650 ± 0.0129", "0.2445 to 0.2855", "", ""]
    assert second[4].startswith("+0.0225 (+0.0")


def test_a_ratio_is_shown_as_times():
    row = of(table(runs()), "samples per second", "b")
    assert cells(row, 0)[4] == "1.50 times (1.50 to 1.50)"
    # One pair has no interval.
    row = of(table([run for run in runs() if run.repetition.seed == 0]), "samples per second", "b")
    assert cells(row, 0) == ["b", "1", "150", "", "1.50 times", ""]


def test_failed_runs_are_counted():
    failed = Run("b", Repetition(2), "runs/b/2", "NaN")
    some = [run if (run.variant, run.repetition.seed) != ("b", 2) else failed for run in runs()]
    assert cells(of(table(some), "train loss", "b"), 4)[1] == "3 of 4"
    none = [run for run in runs() if run.variant == "a"] + [failed]
    assert cells(of(table(none), "train loss", "b"), 4) == ["b", "0 of 1", "", "", "", ""]


def test_the_header_names_the_baseline():
    middle = ["n", "mean ± sd", "95% interval"]
    assert header("test acc", "a lr=1") == ["test acc", *middle, "vs a lr=1 (95%)", "d"]


def test_markdown_and_csv():
    assert markdown(["x", "y"], [["1", "2"]]) == "| x | y |\n| --- | --- |\n| 1 | 2 |\n"
    assert as_csv([{"a": 1, "b": "x, y"}, {"a": None, "b": ""}]) == 'a,b\n1,"x, y"\n,\n'
