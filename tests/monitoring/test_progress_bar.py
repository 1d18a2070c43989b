"""The progress bar: what it shows, and that it does not change the metrics."""

import re
import warnings

import lightning.pytorch as pl
import pytest
import torch
from torchmetrics import MeanMetric, MeanSquaredError, MinMaxMetric, SpearmanCorrCoef
from torchmetrics.classification import MulticlassAccuracy

from bn_lightning import Classifier, FashionMNIST, Task
from bn_lightning.monitoring.progress_bar import MetricsProgressBar
from tests.conftest import QUICK
from tests.projects.friedman.experiment import Regression, Table
from tests.support.logs import QUIET
from tests.support.pseudo_terminal import at_a_terminal


def test_the_bar_shows_loss_accuracy_and_speed(tmp_path):
    code, seen = at_a_terminal("fit", *QUICK, cwd=tmp_path)
    assert code == 0
    shown = r"loss=([\d.]+), acc=([\d.]+), samples/s=([\d,]+), val_acc=([\d.]+)"
    bars = re.findall(rf"Epoch 1:.*?\d+/22 .*?{shown}", seen)
    assert bars
    loss, acc, speed, val_acc = (float(value.replace(",", "")) for value in bars[-1])
    assert 0 < loss < 3 and 0.1 < acc <= 1 and 0.1 < val_acc <= 1 and speed > 100
    assert "v_num" not in seen
    assert len(re.findall(r"epoch  [12]/2  train loss", seen)) == 2
    assert "\x1b[1mclass" in seen  # bold
    assert "view them with: tensorboard --logdir runs" in seen


class Recording(MetricsProgressBar):
    """Records the values that the bar shows after each batch."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def on_train_batch_end(self, trainer, pl_module, *rest):
        super().on_train_batch_end(trainer, pl_module, *rest)
        self.shown.append(self.get_metrics(trainer, pl_module))


def trained_with(bar, model, data, epochs=2, **limits):
    settings = QUIET | {"enable_progress_bar": bar is not None}
    callbacks = [] if bar is None else [bar]
    trainer = pl.Trainer(
        max_epochs=epochs,
        logger=False,
        log_every_n_steps=1,
        callbacks=callbacks,
        **settings,
        **limits,
    )
    torch.manual_seed(0)
    trainer.fit(model(), data())
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_the_bar_does_not_change_the_metrics(capsys):
    def data():
        return FashionMNIST("sample")

    bar = Recording()
    limits = {"limit_train_batches": 7, "limit_val_batches": 1}
    metrics = trained_with(bar, Classifier, data, **limits)
    # After the last batch, the mean so far is the mean of the epoch.
    assert bar.shown[-1]["acc"] == f"{metrics['train_acc']:.3f}"
    assert len({shown["acc"] for shown in bar.shown}) > 10
    assert metrics == trained_with(None, Classifier, data, **limits)
    assert re.search(r"Epoch 2: .*samples/s=", capsys.readouterr().out)


def test_the_bar_shows_the_selected_metric_of_a_task():
    bar = Recording()
    metrics = trained_with(bar, Regression, Table)
    assert bar.shown[-1]["rmse"] == f"{metrics['train_rmse']:.3f}"
    assert set(bar.shown[0]) == {"loss", "rmse", "samples/s"}
    # The training means of the previous epoch are not shown.
    assert set(bar.shown[-1]) == {"loss", "rmse", "samples/s", "val_rmse", "val_r2"}


def test_the_bar_shows_the_metrics_of_a_plain_lightning_module():
    class Plain(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(10, 1)

        def training_step(self, batch, batch_idx):
            loss = (self.layer(batch[0]).flatten() - batch[1]).square().mean()
            self.log("my_loss", loss, prog_bar=True)
            return loss

        def validation_step(self, batch, batch_idx):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.001)

    bar = Recording()
    trained_with(bar, Plain, Table)
    assert set(bar.shown[-1]) == {"my_loss", "samples/s"}


def task_with(metric, selected="val_it"):
    """Return a task with a metric; the rest of it does not matter."""

    class Selects(Task):
        selects = (selected, "max")

        def __init__(self):
            super().__init__(torch.nn.Linear(1, 1), {"it": metric})

    return Selects()


def shown_by_bar(task):
    """Return the metrics that the bar shows for a task during training."""
    bar, trainer = MetricsProgressBar(), pl.Trainer(logger=False, **QUIET)
    trainer.state.stage = "train"
    assert trainer.training
    bar._train_progress_bar = bar.init_train_tqdm()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return bar.get_metrics(trainer, task)


# SpearmanCorrCoef warns that it stores all samples.
stores_samples = pytest.mark.filterwarnings("ignore:Metric `SpearmanCorrcoef` will save all")


@stores_samples
@pytest.mark.parametrize(
    ("metric", "arguments"),
    [(MeanSquaredError, ()), (MulticlassAccuracy, (3,)), (SpearmanCorrCoef, ()), (MeanMetric, ())],
)
def test_no_metric_is_shown_before_the_first_sample(metric, arguments):
    assert shown_by_bar(task_with(metric(*arguments))) == {"loss": ""}


def test_the_mean_so_far_is_shown_and_not_cached():
    task = task_with(MeanSquaredError(squared=False))
    for error, shown in ((1.0, "1.000"), (7.0, "5.000")):  # sqrt((1 + 49) / 2)
        task.train_it.update(torch.tensor([error]), torch.zeros(1))
        assert shown_by_bar(task)["it"] == shown
        assert task.train_it._computed is None
    assert float(task.train_it.compute()) == 5


@stores_samples
@pytest.mark.parametrize(
    "create_metric",
    [
        SpearmanCorrCoef,
        lambda: MinMaxMetric(MeanSquaredError()),
        lambda: MeanSquaredError(num_outputs=2),
    ],
    ids=("stores all samples", "made of other metrics", "several values"),
)
def test_metrics_that_are_slow_or_have_several_values_are_omitted(create_metric):
    metric = create_metric()
    task, values = task_with(metric), torch.tensor([[0.0, 2.0], [1.0, 1.0]])
    if not isinstance(metric, MeanSquaredError):
        values = values[0]
    task.train_it.update(values, values + 1)
    assert shown_by_bar(task) == {"loss": ""}


def test_a_task_that_selects_by_loss_shows_the_loss_once():
    task = task_with(MeanSquaredError(), "val_loss")
    task.train_loss.update(torch.tensor([3.0]))
    assert shown_by_bar(task) == {"loss": ""}
