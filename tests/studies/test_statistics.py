"""Statistics of `compare`, verified with closed forms and SciPy."""

import math

import pytest
from scipy import stats

from bn_lightning.studies.repetitions import Repetition
from bn_lightning.studies.statistics import (
    Run,
    Selection,
    default_threshold,
    mean_and_interval,
    reported_metrics,
    rows,
)

MAX, MIN = Selection("val_acc", "max"), Selection("val_rmse", "min")
LOSS = {
    "a": [0.27, 0.26, 0.28, 0.25],
    "b": [0.29, 0.27, 0.31, 0.28],
}


def runs(losses=LOSS, speed=(100.0, 150.0)):
    return [
        Run(
            variant,
            Repetition(seed),
            f"runs/{variant}/{seed}",
            None,
            {"train_loss": loss, "images_per_second": speed[number]},
        )
        for number, (variant, values) in enumerate(losses.items())
        for seed, loss in enumerate(values)
    ]


def of(found, metric, variant):
    [row] = [row for row in found if (row.metric, row.variant) == (metric, variant)]
    return row


def table(of_runs, threshold=None, selection=MAX):
    metrics = reported_metrics(of_runs, selection, threshold)
    return rows(of_runs, metrics, dict.fromkeys(("a", "b"), "a"))


def names(result, selection, threshold=None):
    shown = reported_metrics([Run("a", Repetition(0), "", None, result)], selection, threshold)
    return [metric.name for metric in shown]


def curve(metric, *values):
    return [{"step": 10 * number, metric: value} for number, value in enumerate(values, 1)]


def test_mean_and_interval_are_equal_to_scipy():
    mean, sd, low, high = mean_and_interval(LOSS["a"])
    reference = stats.t.interval(0.95, 3, loc=mean, scale=stats.sem(LOSS["a"]))
    assert (low, high) == pytest.approx(reference)
    assert (mean, sd) == pytest.approx((0.265, stats.tstd(LOSS["a"])))
    # With two values, the half width is 12.706 times the standard error. This is the 97.5th
    # percentile of Student's t with one degree of freedom.
    assert mean_and_interval([0.0, 2.0])[3] == pytest.approx(1 + 12.7062, abs=1e-4)


@pytest.mark.parametrize(("values", "known"), [([], (None,) * 4), ([0.5], (0.5, None, None, None))])
def test_fewer_than_two_values_have_no_interval(values, known):
    assert mean_and_interval(values) == known


def test_differences_are_paired_by_seed():
    row = of(table(runs()), "train loss", "b")
    reference = stats.ttest_rel(LOSS["b"], LOSS["a"])
    ends = tuple(reference.confidence_interval(0.95))
    assert (row.compared_low, row.compared_high) == pytest.approx(ends)
    # For pairs, t = d * sqrt(n).
    assert row.effect_size == pytest.approx(reference.statistic / math.sqrt(4))
    assert row.pairs == 4
    assert of(table(runs()), "train loss", "a").compared is None


def test_differences_are_paired_by_seed_and_fold():
    keys = [Repetition(seed, (("data.fold", fold),)) for seed in (0, 1) for fold in "01"]
    found = [
        Run(variant, key, "", None, {"train_loss": loss})
        for variant, losses in LOSS.items()
        for key, loss in zip(keys, losses, strict=True)
    ]
    # The order of the runs has no influence.
    row = of(table(found[:4] + found[:3:-1]), "train loss", "b")
    ends = tuple(stats.ttest_rel(LOSS["b"], LOSS["a"]).confidence_interval(0.95))
    assert (row.n, row.pairs) == (4, 4)
    assert (row.compared_low, row.compared_high) == pytest.approx(ends)
    # A pair has the same fold.
    row = of(table([*found[:3], found[7]]), "train loss", "b")
    assert (row.n, row.pairs, row.compared) == (1, 0, None)


def test_a_ratio_is_the_geometric_mean_over_pairs():
    row = of(table(runs()), "samples per second", "b")
    assert (row.compared_by, row.compared) == ("ratio", pytest.approx(1.5))
    assert (row.compared_low, row.compared_high) == pytest.approx((1.5, 1.5))


def test_a_failed_run_is_counted_and_its_pair_is_excluded():
    failed = Run("b", Repetition(2), "runs/b/2", "NaN")
    some = [run if (run.variant, run.repetition.seed) != ("b", 2) else failed for run in runs()]
    row = of(table(some), "train loss", "b")
    assert (row.runs, row.n, row.failed, row.pairs) == (4, 3, 1, 3)
    kept = (0, 1, 3)
    reference = stats.ttest_rel([LOSS["b"][i] for i in kept], [LOSS["a"][i] for i in kept])
    assert row.compared_low == pytest.approx(reference.confidence_interval(0.95).low)


def test_steps_to_a_threshold_end_at_the_first_validation_that_reaches_it():
    values = curve("val_acc", 0.5, 0.8, 0.7)
    reached = Run("a", Repetition(0), "", None, {}, [], values)
    found = [reached.steps_to(threshold, MAX) for threshold in (0.4, 0.6, 0.8, 0.81)]
    assert found == [10, 20, 20, None]
    other = Run("a", Repetition(1), "", None, {}, [], values[:1])
    row = of(table([reached, other], 0.8), "steps to 0.800", "a")
    assert (row.n, row.failed, row.mean) == (1, 0, 20)


def test_a_minimized_metric_reaches_thresholds_that_it_does_not_exceed():
    reached = Run("a", Repetition(0), "", None, {}, [], curve("val_rmse", 3.0, 1.5, 2.0))
    found = [reached.steps_to(threshold, MIN) for threshold in (4.0, 3.0, 2.0, 1.5, 1.4)]
    assert found == [10, 10, 20, 20, None]
    row = of(table([reached], 2.0, MIN), "steps to 2.000", "a")
    assert (row.n, row.mean) == (1, 20)


def test_the_mean_of_every_variant_reaches_the_default_threshold():
    finals = {"a": [0.91, 0.92], "b": [0.836, 0.84]}
    done = [
        Run(variant, Repetition(seed), "", None, {}, [], curve("val_acc", 0.99, final))
        for variant, values in finals.items()
        for seed, final in enumerate(values)
    ]
    assert default_threshold(done, MAX) == 0.835  # 0.838, rounded down
    assert default_threshold([Run("a", Repetition(0), "", "failed")], MAX) is None
    nothing = Run("a", Repetition(0), "", None, {}, [], curve("val_acc", 0.004))
    assert default_threshold([nothing], MAX) is None


@pytest.mark.parametrize(
    ("final", "threshold"),
    [
        (2.7052, 2.8),
        (0.53, 0.53),
        (0.000123, 0.00013),
        (12_345.6, 13_000),
        (99.5, 100),
        (0.0, 0.0),
        (-1.26, -1.2),
        (math.nan, None),
        (math.inf, None),
    ],
)
def test_the_default_threshold_of_a_minimized_metric_has_two_digits(final, threshold):
    better = Run("a", Repetition(0), "", None, {}, [], curve("val_rmse", final - 1))
    worse = Run("b", Repetition(0), "", None, {}, [], curve("val_rmse", 0.0, final))
    assert default_threshold([worse, better], MIN) == threshold
    if threshold is not None:
        assert worse.steps_to(threshold, MIN) and better.steps_to(threshold, MIN)


@pytest.mark.parametrize(
    ("threshold", "name"),
    [(0.8, "0.800"), (2.8, "2.800"), (0.00013, "0.00013"), (13_000, "13000"), (0, "0.000")],
)
def test_small_and_large_thresholds_are_shown_with_their_digits(threshold, name):
    assert f"steps to {name}" in names({}, MIN, threshold)


def test_the_metric_that_the_task_selects_by_is_reported():
    result = {"train_loss": 1.0, "val_loss": 1.0, "test_loss": 1.0}
    found = names(result | {"val_rmse": 2.0, "test_rmse": 2.0}, MIN)
    assert found == ["train loss", "val rmse", "test rmse", "samples per second"]
    # The loss is not reported twice.
    found = names(result, Selection("val_loss", "min"))
    assert found == ["train loss", "val loss", "test loss", "samples per second"]
    # This run was not tested.
    found = names({"train_loss": 1.0, "val_acc": 0.5, "test_acc": None}, MAX)
    assert found == ["train loss", "val acc", "samples per second"]


@pytest.mark.parametrize(("selection", "shown"), [(MAX, "acc"), (MIN, "rmse")])
def test_best_epoch_and_mean_are_reported_if_validation_uses_the_test_set(selection, shown):
    metrics = ("train_loss", f"val_{shown}", f"test_{shown}")
    means = (f"val_{shown}_best", f"val_{shown}_mean_of_last_3")
    result = {"val_images_from": "test set"} | dict.fromkeys((*metrics, *means), 1.0)
    assert names(result, selection) == [
        "train loss",
        f"test {shown}",
        f"test {shown}, best epoch",
        f"test {shown}, mean of last 3",
        "samples per second",
    ]


def test_values_are_ranked_from_best_to_worst():
    values = [2.0, None, 3.0, math.nan, 1.0]
    assert sorted(values, key=MAX.rank)[:3] == [3.0, 2.0, 1.0]
    assert sorted(values, key=MIN.rank)[:3] == [1.0, 2.0, 3.0]
    assert (MAX.worst([1, 2]), MIN.worst([1, 2])) == (1, 2)
    assert (MAX.direction, MIN.direction) == ("maximize", "minimize")


def test_column_names_of_csv_and_json_files():
    assert list(table(runs())[0].as_data()) == [
        "figure",
        "choice",
        "runs",
        "n",
        "failed",
        "mean",
        "sd",
        "low",
        "high",
        "held_by",
        "reference",
        "pairs",
        "compared",
        "compared_low",
        "compared_high",
        "effect_size",
    ]
