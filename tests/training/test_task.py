"""The base class of tasks: metrics, memory format, and the content of its checkpoints."""

import copy
import shutil
import sys
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics import MeanAbsoluteError, MeanMetric, MetricCollection

from bn_lightning import Classifier, ExactResume, FashionMNIST, Step, Task
from bn_lightning.training.batches import TensorBatches
from tests.conftest import QUICK, command, run_here, weights
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


class Minimal(Task):
    """A minimal task."""

    def __init__(self, width: int = 3, **training) -> None:
        super().__init__(nn.Linear(10, width), **training)

    def step(self, batch, stage):
        inputs, targets = batch
        outputs = self(inputs).mean(1)
        return Step(F.mse_loss(outputs, targets), outputs, targets, len(targets))


# Metrics


def test_the_first_metric_name_is_the_loss():
    model = Regression()
    assert model.metric_names == ("loss", "rmse", "r2")
    for stage in ("train", "val", "test"):
        assert model.names(stage) == [f"{stage}_{name}" for name in ("loss", "rmse", "r2")]
    assert Minimal().names("val") == ["val_loss"]


@pytest.mark.parametrize(("selects", "best"), [(("val_rmse", "min"), 2), (("val_acc", "max"), 3)])
def test_the_best_validation_is_determined_by_selects(selects, best):
    class Selecting(Task):
        pass

    Selecting.selects = selects
    found = [
        {"step": step, "val_rmse": rmse, "val_acc": acc}
        for step, rmse, acc in ((1, 3.0, 0.1), (2, 1.0, 0.2), (3, 2.0, 0.3))
    ]
    assert Selecting.best(iter(found))["step"] == best
    assert Selecting.best([]) == {}


def test_each_metric_is_logged_over_the_samples_of_its_epoch():
    """The last batch is smaller, so a mean over batches would differ."""
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
    # The learning rate is 0, so both epochs have the same weights.
    assert logged["train_rmse"] == pytest.approx(logged["train_loss_epoch"] ** 0.5, rel=1e-5)
    [metrics] = trainer.test(model, datamodule=data, verbose=False)
    assert list(metrics) == ["test_loss", "test_rmse", "test_r2"]
    assert metrics["test_rmse"] == pytest.approx(metrics["test_loss"] ** 0.5, rel=1e-5)


def test_a_validation_within_an_epoch_does_not_affect_training_metrics():
    logged = []
    for interval in (2, 1.0):
        torch.manual_seed(0)
        logged.append(fit(Regression(), val_check_interval=interval).callback_metrics)
    for name in ("train_loss_epoch", "train_rmse", "train_r2"):
        assert torch.equal(logged[0][name], logged[1][name]), name


def test_the_given_metric_objects_are_not_changed():
    given = MeanAbsoluteError()

    class Absolute(Task):
        step = Minimal.step

        def __init__(self):
            super().__init__(nn.Linear(10, 1), {"mae": given})

    model = Absolute()
    fit(model)
    assert given.update_count == 0
    assert {"train_mae", "val_mae"} <= set(dict(model.named_children()))


def test_a_nan_loss_appears_in_the_mean_loss():
    model = Classifier()
    with torch.no_grad():
        model.network.fc3.bias[0] = torch.nan
    trainer = fit(model, FashionMNIST("sample"), limit_train_batches=8)
    assert trainer.callback_metrics["train_loss_epoch"].isnan()


def test_shards_of_unequal_size_give_the_gradient_of_the_batch():
    """This test averages gradients over the ranks, as DistributedDataParallel does."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(10, 10), torch.randn(10)
    gradients = []
    for world_size in (1, 3):  # 3 ranks get 4, 3 and 3 samples
        model = Minimal()
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


def test_shards_are_assumed_equal_if_the_loader_has_no_sizes():
    model = Minimal()
    model.trainer = SimpleNamespace(world_size=2, train_dataloader=[], log_every_n_steps=0)
    model._means_are_logged = True
    model.training_step((torch.randn(4, 10), torch.randn(4)), 0)
    assert model.step_samples == 8


class Fails(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 2:
            trainer.save_checkpoint(trainer.default_root_dir + "/failed.ckpt")
            raise RuntimeError("planted")


def test_metrics_of_an_interrupted_epoch_do_not_count_in_a_second_fit(tmp_path):
    model = Regression()
    state = copy.deepcopy(model.state_dict())
    expected = fit(model).callback_metrics["train_rmse"]

    model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="planted"):
        fit(model, callbacks=[Fails()], default_root_dir=str(tmp_path))
    model.load_state_dict(state)
    assert fit(model).callback_metrics["train_rmse"] == expected

    pl.Trainer(**QUIET).test(model, table(), tmp_path / "failed.ckpt", False, weights_only=True)
    model.load_state_dict(state)
    assert fit(model).callback_metrics["train_rmse"] == expected


# Precision of metrics


class Observed(Regression):
    """Records the loss, outputs and targets of each batch."""

    def __init__(self, **training) -> None:
        super().__init__(**training)
        self.others = nn.ModuleDict({"mean": MetricCollection([MeanMetric()])})
        self.seen = {"train": [], "val": []}

    def step(self, batch, stage):
        step = super().step(batch, stage)
        self.seen[stage].append(step)
        self.others["mean"].update(step.loss.detach())
        return step


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_metrics_of_a_16_bit_network_are_computed_in_float32(precision):
    model = Observed(lr=0.0)
    found = fit(model, Table(rows=2_000, batch_size=10), precision=precision).callback_metrics
    assert model.network[0].weight.dtype.itemsize == 2
    for stage, tag in (("train", "train_loss_epoch"), ("val", "val_loss")):
        # The first two validation batches are those of Lightning's sanity check.
        steps = model.seen[stage][2 if stage == "val" else 0 :]
        loss = torch.cat([step.loss.detach().double().expand(step.num_samples) for step in steps])
        assert float(found[tag]) == pytest.approx(loss.mean().item(), rel=1e-6)
        outputs, targets = (torch.cat([s[i].detach().double() for s in steps]) for i in (1, 2))
        rmse = (outputs - targets).square().mean().sqrt().item()
        assert float(found[f"{stage}_rmse"]) == pytest.approx(rmse, rel=1e-5)
        spread = (targets - targets.mean()).square().mean().item()
        assert float(found[f"{stage}_r2"]) == pytest.approx(1 - rmse**2 / spread, rel=1e-5)


@pytest.mark.parametrize(
    "convert",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.to("cpu", torch.float16),
        lambda model: nn.Sequential(model).to(torch.bfloat16)[0],
        lambda model: model.half(),
        lambda model: model.double(),
    ],
)
def test_conversions_keep_metrics_and_their_values(convert):
    model = Observed()
    metrics = [model.train_loss, model.others["mean"]["MeanMetric"]]
    for metric in metrics:
        metric.update(torch.tensor([70_001.0, 1.0]))
    children = list(dict(model.named_modules()))
    convert(model)
    assert list(dict(model.named_modules())) == children
    assert model.network[0].weight.dtype != torch.float32
    for metric in metrics:
        assert metric.dtype == torch.float32
        metric.update(torch.tensor([0.30, 70_000.0]))
        assert metric.compute().item() == pytest.approx(140_002.3 / 4, rel=1e-6)
        metric.reset()
        assert metric.mean_value.dtype == torch.float32


def test_metrics_are_moved_to_the_device_of_the_network():
    model = Observed().to("meta", torch.bfloat16)
    for metric in (model.train_loss, model.val_rmse, model.others["mean"]["MeanMetric"]):
        assert metric.device.type == "meta"
        assert all(state.device.type == "meta" for state in metric.metric_state.values())
    assert model.train_loss.mean_value.dtype == torch.float32


# Memory format


def is_channels_last(model):
    output = model.network.conv2(torch.ones(2, 6, 12, 12))
    return output.is_contiguous(memory_format=torch.channels_last)


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
        ("own_layouts.Preferring", True),
    ],
)
def test_the_norm_layers_determine_the_memory_format(tmp_path, monkeypatch, norm, is_last):
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("own_layouts", None)
    (tmp_path / "own_layouts.py").write_text(
        "from bn_lightning import BatchNorm\n\n\n"
        "class Indifferent(BatchNorm):\n    prefers_channels_last = False\n\n\n"
        "class Preferring(BatchNorm):\n    prefers_channels_last = True\n"
    )
    model = Classifier(norm)
    fit(model, FashionMNIST("sample"), fast_dev_run=True)
    assert is_channels_last(model) == is_last


@pytest.mark.parametrize("norm", ["custom", "builtin", "none", "group"])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_an_explicit_memory_format_takes_precedence(norm, layout):
    model = Classifier(norm, memory_format=layout)
    assert not is_channels_last(model)
    fit(model, FashionMNIST("sample"), fast_dev_run=True)
    assert is_channels_last(model) == (layout == "channels_last")


def test_an_unknown_memory_format_is_refused(main):
    code, _, err = main("fit", *QUICK, "--model.memory_format", "channels_first")
    assert code == 2
    assert "channels_first" in err and "channels_last" in err


# Methods of a subclass, and their defaults


def test_defaults_of_a_minimal_task():
    model = Minimal()
    assert (model.selects, model.import_paths) == (("val_loss", "min"), ("optimizer", "scheduler"))
    assert (model.describe(), model.facts(), model.summary()) == ("Linear", {}, [])
    assert model.test_report() == "No table of classes: this task has no classes."
    assert model.confusion is None
    inputs = torch.randn(4, 10)
    assert torch.equal(model.predict_step((inputs, torch.zeros(4)), 0), model.network(inputs))
    with pytest.raises(NotImplementedError, match=r"Task has no step\(\)"):
        Task(nn.Linear(1, 1)).step(None, "train")


def test_settings_of_the_subclass_and_the_base_class_are_saved_as_plain_data(tmp_path):
    model = Minimal(width=5, lr=0.25, optimizer="AdamW", optimizer_args={"weight_decay": 0.5})
    assert dict(model.hparams) == {
        "width": 5,
        "lr": 0.25,
        "optimizer": "AdamW",
        "optimizer_args": {"weight_decay": 0.5},
        "scheduler": None,
        "scheduler_args": None,
        "decay_norms_and_biases": True,
        "warmup_steps": 0,
        "init_from": None,
        "compile": False,
        "memory_format": "auto",
    }
    fit(model).save_checkpoint(tmp_path / "x.ckpt")
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert content["hyper_parameters"] == dict(model.hparams)
    restored = Minimal.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert restored.hparams == model.hparams
    assert torch.equal(restored.network.weight, model.network.weight)


def test_a_subclass_may_have_a_setting_named_network(tmp_path):
    class ByName(Task):
        step = Minimal.step

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


def test_float64_weights_are_restored_exactly(tmp_path):
    """Lightning loads a checkpoint before it converts the module to its precision."""
    exact = {"precision": "64-true"}
    fit(Regression(), **exact).save_checkpoint(tmp_path / "x.ckpt")
    again = fit(Regression(), ckpt_path=tmp_path / "x.ckpt", **exact)
    saved = weights(tmp_path / "x.ckpt")
    assert saved["network.0.weight"].dtype == torch.float64
    assert not torch.equal(saved["network.0.weight"].float().double(), saved["network.0.weight"])
    for name, value in again.lightning_module.state_dict().items():
        assert torch.equal(value, saved[name]), name


def test_metrics_of_an_unfinished_epoch_are_restored(tmp_path):
    """RMSE and R2 are not means over samples."""

    def train(*, max_steps=-1, ckpt_path=None):
        resume = ExactResume(dirpath=str(tmp_path))
        settings = {"callbacks": [resume], "enable_checkpointing": True, "max_steps": max_steps}
        torch.manual_seed(0)
        model = Regression()
        return fit(model, ckpt_path=ckpt_path, max_epochs=2, **settings).callback_metrics

    uninterrupted = dict(train())  # 14 steps
    train(max_steps=10)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert content["train_metrics"]["train_r2.total"].tolist() == [90]
    resumed = train(ckpt_path=tmp_path / "last.ckpt")
    for name in ("train_loss_epoch", "train_rmse", "train_r2", "val_rmse"):
        assert torch.equal(resumed[name], uninterrupted[name]), name


def test_a_learning_rate_on_the_command_line_overrides_the_checkpoint(main, trained, tmp_path):
    last = trained[0] / "checkpoints" / "last.ckpt"
    flags = ("--trainer.max_epochs", 3, "--trainer.limit_train_batches", 2, "--model.lr", "0.125")
    assert main("fit", "--ckpt_path", last, *flags)[0] == 0
    resumed = torch.load(tmp_path / "runs/lenet/0/checkpoints/last.ckpt", weights_only=True)
    assert resumed["optimizer_states"][0]["param_groups"][0]["lr"] == 0.125


def test_optimizer_arguments_override_the_checkpoint_unless_there_is_a_scheduler(tmp_path):
    schedule = {"scheduler": "StepLR", "scheduler_args": {"step_size": 1}}
    for scheduler, lr in (({}, 0.5), (schedule, 0.01)):
        before = Regression(lr=0.1, optimizer_args={"momentum": 0.1}, **scheduler)
        fit(before).save_checkpoint(tmp_path / "x.ckpt")
        after = Regression(lr=0.5, optimizer_args={"momentum": 0.9}, **scheduler)
        trainer = fit(after, ckpt_path=tmp_path / "x.ckpt", max_epochs=2, max_steps=8)
        [group] = trainer.optimizers[0].param_groups
        assert group["lr"] == pytest.approx(lr)
        assert group["momentum"] == (0.1 if scheduler else 0.9)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_and_eager_runs_interchange_checkpoints(tmp_path):
    run_here("fit", *QUICK, "--name", "eager", cwd=tmp_path)
    command("fit", *QUICK, "--name", "compiled", "--model.compile", "true", cwd=tmp_path)
    names = ("eager", "compiled")
    eager, compiled = (tmp_path / f"runs/{name}/0/checkpoints/last.ckpt" for name in names)
    assert weights(eager).keys() == weights(compiled).keys()
    outputs = [
        run(
            *("test", "--data.source", "sample", "--ckpt_path", checkpoint),
            *("--model.compile", is_compiled),
            cwd=tmp_path,
        ).stdout
        for checkpoint in (eager, compiled)
        for run, is_compiled in ((run_here, "false"), (command, "true"))
    ]
    assert outputs[0] == outputs[1] != ""
    assert outputs[2] == outputs[3] != ""
