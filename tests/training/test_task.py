"""The base class of tasks: metrics, memory format, and what it keeps in a checkpoint."""

import shutil
import sys
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics import MeanAbsoluteError

from bn_lightning import Classifier, ExactResume, FashionMNIST, Step, Task
from bn_lightning.training.batches import TensorBatches
from tests.conftest import QUICK, command, weights
from tests.projects.friedman.experiment import Regression, Table

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


def table(**settings):
    return Table(rows=200, batch_size=30, **settings)  # 7 batches, the last of 20 rows


def fit(model, data=None, ckpt_path=None, **settings):
    pl.seed_everything(0)
    trainer = pl.Trainer(**QUIET | {"max_epochs": 1} | settings)
    trainer.fit(model, datamodule=data or table(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


class Least(Task):
    """A task that says as little as it can."""

    def __init__(self, width: int = 3, **training) -> None:
        super().__init__(nn.Linear(10, width), **training)

    def step(self, batch, stage):
        inputs, targets = batch
        outputs = self(inputs).mean(1)
        return Step(F.mse_loss(outputs, targets), outputs, targets, len(targets))


# Metrics


def test_names_of_metrics_begin_with_the_loss():
    model = Regression()
    assert model.metric_names == ("loss", "rmse", "r2")
    for stage in ("train", "val", "test"):
        assert model.names(stage) == [f"{stage}_{name}" for name in ("loss", "rmse", "r2")]
    assert Least().names("val") == ["val_loss"]


@pytest.mark.parametrize(("selects", "best"), [(("val_rmse", "min"), 2), (("val_acc", "max"), 3)])
def test_the_best_validation_is_the_one_that_the_task_selects(selects, best):
    class Selecting(Task):
        pass

    Selecting.selects = selects
    found = [
        {"step": step, "val_rmse": rmse, "val_acc": acc}
        for step, rmse, acc in ((1, 3.0, 0.1), (2, 1.0, 0.2), (3, 2.0, 0.3))
    ]
    assert Selecting.best(iter(found))["step"] == best
    assert Selecting.best([]) == {}


def test_each_metric_is_logged_as_a_mean_over_its_epoch():
    """Over samples, not over batches: the last batch is smaller."""
    model, data = Regression(lr=0.0), table()
    trainer = fit(model, data, max_epochs=2)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    expected = {"train_loss_epoch", "train_rmse", "train_r2", "val_loss", "val_rmse", "val_r2"}
    assert logged.keys() == expected
    inputs, targets = data.val_dataloader().take(torch.arange(200, 300))
    with torch.no_grad():
        outputs = model.eval()(inputs)
    loss = F.mse_loss(outputs, targets).item()
    spread = (targets - targets.mean()).square().mean().item()
    assert logged["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert logged["val_rmse"] == pytest.approx(loss**0.5, rel=1e-5)
    assert logged["val_r2"] == pytest.approx(1 - loss / spread, rel=1e-4)
    # Of the second epoch alone, in which the weights are those of the first.
    assert logged["train_rmse"] == pytest.approx(logged["train_loss_epoch"] ** 0.5, rel=1e-5)
    [figures] = trainer.test(model, datamodule=data, verbose=False)
    assert list(figures) == ["test_loss", "test_rmse", "test_r2"]
    assert figures["test_rmse"] == pytest.approx(figures["test_loss"] ** 0.5, rel=1e-5)


def test_stages_have_metrics_of_their_own():
    """A validation within an epoch leaves the training metrics alone."""
    logged = []
    for interval in (2, 1.0):
        torch.manual_seed(0)
        logged.append(fit(Regression(), val_check_interval=interval).callback_metrics)
    for name in ("train_loss_epoch", "train_rmse", "train_r2"):
        assert torch.equal(logged[0][name], logged[1][name]), name


def test_the_metrics_that_are_given_are_not_changed():
    given = MeanAbsoluteError()

    class Absolute(Task):
        step = Least.step

        def __init__(self):
            super().__init__(nn.Linear(10, 1), {"mae": given})

    model = Absolute()
    fit(model)
    assert given.update_count == 0
    assert {"train_mae", "val_mae"} <= set(dict(model.named_children()))


def test_a_loss_that_is_not_a_number_shows():
    model = Classifier()
    with torch.no_grad():
        model.network.fc3.bias[0] = torch.nan
    trainer = fit(model, FashionMNIST("sample"), limit_train_batches=8)
    assert trainer.callback_metrics["train_loss_epoch"].isnan()


def test_the_sum_of_shards_of_any_size_is_the_gradient_of_the_batch():
    """DistributedDataParallel averages the gradients of its processes; so does this test."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(10, 10), torch.randn(10)
    gradients = []
    for world_size in (1, 3):  # 10 samples are 4, 3 and 3
        model = Least()
        with torch.no_grad():
            model.network.weight.copy_(torch.arange(30.0).view(3, 10) / 30)
            model.network.bias.zero_()
        for rank in range(world_size):
            shards = (inputs, targets, torch.arange(10), 10, None, rank, world_size)
            loader = TensorBatches(*shards)
            model.trainer = SimpleNamespace(
                world_size=world_size, train_dataloader=loader, log_every_n_steps=0
            )
            model._means_are_logged = True  # logging needs a loop
            [batch] = loader
            model.training_step(batch, 0).backward()
            assert model.step_samples == 10
        gradients.append(model.network.weight.grad / world_size)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


def test_a_loader_that_does_not_say_its_sizes_is_taken_to_give_equal_shards():
    model = Least()
    model.trainer = SimpleNamespace(world_size=2, train_dataloader=[], log_every_n_steps=0)
    model._means_are_logged = True
    model.training_step((torch.randn(4, 10), torch.randn(4)), 0)
    assert model.step_samples == 8


# Memory format


def is_channels_last(model):
    weight = model.network.conv2.weight
    last, first = (
        weight.is_contiguous(memory_format=layout)
        for layout in (torch.channels_last, torch.contiguous_format)
    )
    assert last != first  # of (16, 6, 5, 5) one or the other
    return last


@pytest.mark.parametrize(
    ("norm", "is_last"),
    [
        ("custom", True),
        ("none", True),
        ("builtin", False),
        ("group", False),
        ("article", False),
        ("torch.nn.Identity", True),
        ("own_layouts.Indifferent", False),
        ("own_layouts.Fond", True),
    ],
)
def test_the_norms_decide_the_memory_format(tmp_path, monkeypatch, norm, is_last):
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("own_layouts", None)
    (tmp_path / "own_layouts.py").write_text(
        "from bn_lightning import BatchNorm\n\n\n"
        "class Indifferent(BatchNorm):\n    prefers_channels_last = False\n\n\n"
        "class Fond(BatchNorm):\n    prefers_channels_last = True\n"
    )
    model = Classifier(norm)
    fit(model, FashionMNIST("sample"), fast_dev_run=True)
    assert is_channels_last(model) == is_last


@pytest.mark.parametrize("norm", ["custom", "builtin", "none", "group"])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_a_memory_format_that_is_given_decides(norm, layout):
    model = Classifier(norm, memory_format=layout)
    assert not is_channels_last(model)  # not before the run
    fit(model, FashionMNIST("sample"), fast_dev_run=True)
    assert is_channels_last(model) == (layout == "channels_last")


def test_an_unknown_memory_format_is_refused(main):
    code, _, err = main("fit", *QUICK, "--model.memory_format", "channels_first")
    assert code == 2
    assert "channels_first" in err and "channels_last" in err


# What a subclass says, and what it may leave out


def test_a_task_says_little_by_default():
    model = Least()
    assert (model.selects, model.import_paths) == (("val_loss", "min"), ("optimizer", "scheduler"))
    assert (model.describe(), model.facts(), model.summary()) == ("Linear", {}, [])
    assert model.test_report() == "no table of classes: this task has no classes"
    assert model.confusion is None
    inputs = torch.randn(4, 10)
    assert torch.equal(model.predict_step((inputs, torch.zeros(4)), 0), model.network(inputs))
    with pytest.raises(NotImplementedError, match=r"Task has no step\(\)"):
        Task(nn.Linear(1, 1)).step(None, "train")


def test_settings_are_those_of_the_subclass_and_of_the_base_as_plain_data(tmp_path):
    model = Least(width=5, lr=0.25, optimizer="AdamW", optimizer_args={"weight_decay": 0.5})
    assert dict(model.hparams) == {
        "width": 5,
        "lr": 0.25,
        "optimizer": "AdamW",
        "optimizer_args": {"weight_decay": 0.5},
        "scheduler": None,
        "scheduler_args": None,
        "compile": False,
        "memory_format": "auto",
    }
    fit(model).save_checkpoint(tmp_path / "x.ckpt")
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert content["hyper_parameters"] == dict(model.hparams)
    restored = Least.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert restored.hparams == model.hparams
    assert torch.equal(restored.network.weight, model.network.weight)


def test_a_subclass_may_have_a_network_as_a_setting(tmp_path):
    class ByName(Task):
        step = Least.step

        def __init__(self, network: str = "linear", **training) -> None:
            super().__init__(nn.Linear(10, 3), **training)

    model = ByName("other", lr=0.25)
    assert (model.hparams["network"], model.hparams["lr"]) == ("other", 0.25)
    assert isinstance(model.network, nn.Linear)
    assert "metrics" not in model.hparams
    fit(model).save_checkpoint(tmp_path / "x.ckpt")
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert content["hyper_parameters"]["network"] == "other"


# Checkpoints


def test_weights_in_float64_are_restored_as_they_were(tmp_path):
    """Lightning loads a checkpoint before it converts the module to its precision."""
    exact = {"precision": "64-true"}
    fit(Regression(), **exact).save_checkpoint(tmp_path / "x.ckpt")
    again = fit(Regression(), ckpt_path=tmp_path / "x.ckpt", **exact)
    saved = weights(tmp_path / "x.ckpt")
    assert saved["network.0.weight"].dtype == torch.float64
    assert not torch.equal(saved["network.0.weight"].float().double(), saved["network.0.weight"])
    for name, value in again.lightning_module.state_dict().items():
        assert torch.equal(value, saved[name]), name


def test_metrics_of_an_unfinished_epoch_go_on(tmp_path):
    """Also those that are no mean: a root of a mean, and a coefficient of four sums."""

    def train(*, max_steps=-1, ckpt_path=None):
        resume = ExactResume(dirpath=str(tmp_path))
        settings = {"callbacks": [resume], "enable_checkpointing": True, "max_steps": max_steps}
        torch.manual_seed(0)
        model = Regression()
        return fit(model, ckpt_path=ckpt_path, max_epochs=2, **settings).callback_metrics

    whole = dict(train())
    train(max_steps=10)  # of 14
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert content["train_metrics"]["train_r2.total"].tolist() == [90]
    resumed = train(ckpt_path=tmp_path / "last.ckpt")
    for name in ("train_loss_epoch", "train_rmse", "train_r2", "val_rmse"):
        assert torch.equal(resumed[name], whole[name]), name


def test_a_learning_rate_that_is_typed_beats_the_one_in_the_checkpoint(main, trained, tmp_path):
    last = trained[0] / "checkpoints" / "last.ckpt"
    flags = ("--trainer.max_epochs", 3, "--trainer.limit_train_batches", 2, "--model.lr", "0.125")
    assert main("fit", "--ckpt_path", last, *flags)[0] == 0
    resumed = torch.load(tmp_path / "runs/lenet/0/checkpoints/last.ckpt", weights_only=True)
    assert resumed["optimizer_states"][0]["param_groups"][0]["lr"] == 0.125


def test_an_optimizers_argument_beats_it_too_and_a_schedule_does_not(tmp_path):
    schedule = {"scheduler": "StepLR", "scheduler_args": {"step_size": 1}}
    for kept, lr in (({}, 0.5), (schedule, 0.01)):
        before = Regression(lr=0.1, optimizer_args={"momentum": 0.1}, **kept)
        fit(before).save_checkpoint(tmp_path / "x.ckpt")
        after = Regression(lr=0.5, optimizer_args={"momentum": 0.9}, **kept)
        trainer = fit(after, ckpt_path=tmp_path / "x.ckpt", max_epochs=2, max_steps=8)
        [group] = trainer.optimizers[0].param_groups
        assert group["lr"] == pytest.approx(lr)
        assert group["momentum"] == (0.1 if kept else 0.9)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_and_eager_runs_interchange_checkpoints(tmp_path):
    command("fit", *QUICK, "--name", "eager", cwd=tmp_path)
    command("fit", *QUICK, "--name", "compiled", "--model.compile", "true", cwd=tmp_path)
    names = ("eager", "compiled")
    eager, compiled = (tmp_path / f"runs/{name}/0/checkpoints/last.ckpt" for name in names)
    assert weights(eager).keys() == weights(compiled).keys()
    figures = [
        command(
            *("test", "--data.source", "sample", "--ckpt_path", checkpoint),
            *("--model.compile", is_compiled),
            cwd=tmp_path,
        ).stdout
        for checkpoint in (eager, compiled)
        for is_compiled in ("false", "true")
    ]
    assert figures[0] == figures[1] != ""
    assert figures[2] == figures[3] != ""
