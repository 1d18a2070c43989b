"""The statistics of a comparison, held against closed forms and SciPy's own tests."""

import math

import pytest
from scipy import stats

from bn_lightning.studies.statistics import Run, as_csv, cells, figures, markdown, mean_and_interval, rows

LOSS = {
    "a": [0.27, 0.26, 0.28, 0.25],
    "b": [0.29, 0.27, 0.31, 0.28],
}


def runs(losses=LOSS, speed=(100.0, 150.0)):
    return [
        Run(choice, seed, f"runs/{choice}/{seed}", None, {"train_loss": loss, "images_per_second": speed[number]})
        for number, (choice, values) in enumerate(losses.items())
        for seed, loss in enumerate(values)
    ]


def of(found, figure, choice):
    [row] = [row for row in found if (row.figure, row.choice) == (figure, choice)]
    return row


def table(of_runs, accuracy=None):
    return rows(of_runs, figures(of_runs, accuracy), dict.fromkeys(("a", "b"), "a"))


def test_mean_and_interval_are_those_of_scipy():
    mean, sd, low, high = mean_and_interval(LOSS["a"])
    reference = stats.t.interval(0.95, 3, loc=mean, scale=stats.sem(LOSS["a"]))
    assert (low, high) == pytest.approx(reference)
    assert (mean, sd) == pytest.approx((0.265, stats.tstd(LOSS["a"])))
    # Two values: the half width is 12.706 times the standard error, t's 97.5th percentile with one degree of freedom.
    assert mean_and_interval([0.0, 2.0])[3] == pytest.approx(1 + 12.7062, abs=1e-4)


@pytest.mark.parametrize(("values", "known"), [([], (None,) * 4), ([0.5], (0.5, None, None, None))])
def test_too_few_values_have_no_interval(values, known):
    assert mean_and_interval(values) == known


def test_differences_are_of_pairs():
    row = of(table(runs()), "train loss", "b")
    reference = stats.ttest_rel(LOSS["b"], LOSS["a"])
    assert (row.compared_low, row.compared_high) == pytest.approx(tuple(reference.confidence_interval(0.95)))
    # t = d sqrt(n) for pairs
    assert row.effect_size == pytest.approx(reference.statistic / math.sqrt(4))
    assert row.pairs == 4
    assert of(table(runs()), "train loss", "a").compared is None


def test_a_ratio_is_the_geometric_mean_of_those_of_pairs():
    row = of(table(runs()), "images per second", "b")
    assert (row.held_by, row.compared) == ("ratio", pytest.approx(1.5))
    assert cells(row, 0)[4] == "1.50 times (1.50 to 1.50)"


def test_a_failed_run_is_counted_and_its_pair_left_out():
    some = [run if (run.choice, run.seed) != ("b", 2) else Run("b", 2, "runs/b/2", "NaN") for run in runs()]
    row = of(table(some), "train loss", "b")
    assert (row.n, row.failed, row.pairs) == (3, 1, 3)
    assert cells(row, 4)[1] == "3 of 4"
    kept = (0, 1, 3)
    reference = stats.ttest_rel([LOSS["b"][i] for i in kept], [LOSS["a"][i] for i in kept])
    assert row.compared_low == pytest.approx(reference.confidence_interval(0.95).low)


def test_steps_to_an_accuracy_are_those_of_the_first_validation_that_has_it():
    curve = [{"step": 10, "val_acc": 0.5}, {"step": 20, "val_acc": 0.8}, {"step": 30, "val_acc": 0.7}]
    reached = Run("a", 0, "", None, {}, [], curve)
    assert [reached.steps_to(accuracy) for accuracy in (0.4, 0.6, 0.8, 0.81)] == [10, 20, 20, None]
    row = of(table([reached, Run("a", 1, "", None, {}, [], curve[:1])], 0.8), "steps to 0.800", "a")
    assert (row.n, row.failed, row.mean) == (1, 0, 20)


def test_forms():
    [first, *_] = lines = [cells(row, 4) for row in table(runs())[:2]]
    assert first == ["a", "4", "0.2650 ± 0.0129", "0.2445 to 0.2855", "", ""]
    assert markdown(["x", "y"], [["1", "2"]]) == "| x | y |\n| --- | --- |\n| 1 | 2 |\n"
    assert lines[1][4].startswith("+0.0225 (+0.0")
    assert as_csv([{"a": 1, "b": "x, y"}, {"a": None, "b": ""}]) == 'a,b\n1,"x, y"\n,\n'
