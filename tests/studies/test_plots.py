"""Plots of `compare`."""

import pytest
from matplotlib.figure import Figure
from PIL import Image

from bn_lightning.studies import plots
from bn_lightning.studies.repetitions import Repetition
from bn_lightning.studies.statistics import Run, Selection
from bn_lightning.studies.variants import Variant

MAX, MIN = Selection("val_acc", "max"), Selection("val_rmse", "min")


@pytest.fixture
def axes(monkeypatch):
    """The axes of all saved figures."""
    found = []
    save = Figure.savefig

    def savefig(figure, *args, **kwargs):
        found.extend(figure.axes)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return found


def run(variant, seed, selection, value, test_set=False):
    result = {"val_images_from": "test set" if test_set else "training set"}
    result |= {selection.metric: value, selection.test_metric: value}
    validations = [{"step": 10 * n, selection.metric: value * n} for n in (1, 2, 3)]
    epochs = [{"train_loss": 1 / n} for n in (1, 2, 3)]
    return Run(variant, Repetition(seed), "", None, result, epochs, validations)


def is_not_blank(path):
    with Image.open(path) as picture:
        return len(picture.convert("L").getcolors(256)) > 20


def test_learning_curves_are_means_over_seeds(axes, tmp_path):
    runs = [run("a", 0, MAX, 0.1), run("a", 1, MAX, 0.3), run("b", 0, MAX, 0.2)]
    runs.append(Run("b", Repetition(1), "", "failed"))
    plots.learning_curves(runs, MAX, tmp_path / "curves.png")
    assert is_not_blank(tmp_path / "curves.png")
    left, right = axes
    assert (left.get_ylabel(), right.get_ylabel()) == ("train loss", "val acc")
    line = right.get_lines()[0]
    assert list(line.get_xdata()) == [10, 20, 30]
    assert list(line.get_ydata()) == pytest.approx([0.2, 0.4, 0.6])
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["a", "b"]
    assert right.get_legend().get_title().get_text() == "mean over 2 seeds\n(band: min to max)"


def test_the_legend_covers_no_curve_and_epochs_are_integers(axes, tmp_path):
    many = [run(f"a variant with a long name {n}", 0, MAX, n / 9) for n in range(9)]
    plots.learning_curves(many, MAX, tmp_path / "curves.png")
    points = [(x, [run("a", 0, MAX, 0.4)]) for x in (1.0, 2.0)]
    plots.metric_by_setting("data.shift", {"a": points, "b": points}, MAX, tmp_path / "shift.png")
    left, right, setting = axes
    for one in (right, setting):
        legend = one.get_legend().get_window_extent()
        assert not legend.overlaps(one.get_window_extent())
        assert legend.x1 <= one.figure.bbox.x1
        assert one.get_window_extent().width > 150
    for one in (left, right, setting):
        ticks = one.get_xticks()
        assert len(ticks) > 1 and all(tick == round(tick) for tick in ticks)


@pytest.mark.parametrize("selection", [MAX, MIN])
def test_axis_labels_name_the_metric_and_the_data_set(axes, tmp_path, selection):
    for test_set in (False, True):
        runs = [run("a", 0, selection, 0.1, test_set)]
        plots.learning_curves(runs, selection, tmp_path / "curves.png")
    assert axes[1].get_ylabel() == selection.label
    assert axes[3].get_ylabel() == selection.test_label


def test_numeric_settings_have_one_line_per_combination_of_other_settings():
    settings = [(norm, lr) for norm in ("a", "b") for lr in ("1", "0.1")]
    variants = [
        Variant(f"{norm} lr={lr}", "", (), (("model.norm", norm), ("model.lr", lr)))
        for norm, lr in settings
    ]
    runs = [run(variant.name, 0, MAX, 0.5) for variant in variants]
    found = plots.numeric_settings(runs, variants)
    assert list(found) == ["model.lr"]
    assert list(found["model.lr"]) == ["a", "b"]
    points = found["model.lr"]["a"]
    assert [x for x, _ in points] == [0.1, 1.0]
    assert [runs[0].variant for _, runs in points] == ["a lr=0.1", "a lr=1"]
    # A line needs two values, and `inf` cannot be drawn.
    assert plots.numeric_settings(runs, variants[:1]) == {}
    infinite = [Variant(lr, "", (), (("model.lr", lr),)) for lr in ("1", "inf")]
    assert plots.numeric_settings([], infinite) == {}


@pytest.mark.parametrize(("selection", "level"), [(MAX, 0.0), (MIN, 0.6)])
def test_metric_by_setting(axes, tmp_path, selection, level):
    points = [
        (0.1, [run("lr=0.1", 0, selection, 0.4), run("lr=0.1", 1, selection, 0.6)]),
        (1.0, [run("lr=1", 0, selection, 0.3), Run("lr=1", Repetition(1), "", "non-finite loss")]),
    ]
    plots.metric_by_setting("model.lr", {"": points}, selection, tmp_path / "lr.png")
    assert is_not_blank(tmp_path / "lr.png")
    [drawn] = axes
    assert drawn.get_ylabel() == f"{selection.test_label} (x: failed run)"
    assert (drawn.get_xlabel(), drawn.get_xscale()) == ("model.lr", "log")
    *_, mean, failed = drawn.get_lines()
    assert list(mean.get_ydata()) == pytest.approx([0.5, 0.3])
    # A failed run must not look like the best one.
    assert (list(failed.get_xdata()), list(failed.get_ydata())) == ([1.0], [level])


def test_the_axis_label_mentions_no_failures_if_there_are_none(axes, tmp_path):
    points = [(x, [run("a", 0, MAX, 0.4)]) for x in (1.0, 2.0)]
    plots.metric_by_setting("data.shift", {"a": points, "b": points}, MAX, tmp_path / "shift.png")
    assert (axes[0].get_ylabel(), axes[0].get_xscale()) == ("test acc", "linear")
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["a", "b"]
