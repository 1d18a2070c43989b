"""When the network is monitored, and that nothing is changed by it."""

import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from bn_lightning import Classifier, FashionMNIST, NormMonitor, UserError
from bn_lightning.monitoring import norm_monitor
from tests.conftest import QUICK, assert_same_weights
from tests.projects.friedman.experiment import Regression, Table
from tests.support.logs import QUIET, MemoryLogger, events_in


def watch(tmp_path, model, every_n_steps=1, steps=4, callbacks=(), **settings):
    logger = MemoryLogger(tmp_path)
    trainer = pl.Trainer(
        max_steps=steps,
        logger=logger,
        callbacks=[NormMonitor(every_n_steps), *callbacks],
        **{"limit_val_batches": 0} | QUIET | settings,
    )
    trainer.fit(model, FashionMNIST("sample"))
    return logger.kept


class Truth(pl.Callback):
    """Records what goes through the network, by hooks of its own."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.step = trainer.global_step
        self.seen = getattr(self, "seen", {})
        for name in ("norm1", "norm2", "norm3", "norm4"):
            module = getattr(pl_module.network, name)

            def hook(module, args, output, name=name):
                kept = {n: v.detach().clone().flatten() for n, v in module.state_dict().items()}
                self.seen[name, self.step] = (
                    args[0].detach().clone(),
                    output.detach().clone(),
                    kept,
                )

            def before(module, args, name=name):
                self.seen["before", name, self.step] = {
                    n: v.clone().flatten() for n, v in module.state_dict().items()
                }

            module.register_forward_pre_hook(before)
            module.register_forward_hook(hook)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = {n: p.grad.clone() for n, p in pl_module.network.named_parameters()}
        self.seen["gradients", self.step] = gradients


@pytest.mark.parametrize("norm", ["custom", "builtin", "article", "renorm"])
def test_figures_are_those_of_the_network(tmp_path, norm):
    truth = Truth()
    kept = watch(tmp_path, Classifier(norm=norm), steps=3, callbacks=[truth])
    for step in range(3):
        for number, name in enumerate(("norm1", "norm2", "norm3", "norm4"), 1):
            x, y, _ = truth.seen[name, step]
            before = truth.seen["before", name, step]
            dims = [d for d in range(x.dim()) if d != 1]
            var, mean = torch.var_mean(x.double(), dims, correction=0)
            running_mean = next(v for n, v in before.items() if "mean" in n)
            running_var = next(
                v if "var" in n else v.square()
                for n, v in before.items()
                if "var" in n or "std" in n
            )
            gamma = next(v for n, v in before.items() if n in ("weight", "gamma"))
            beta = next(v for n, v in before.items() if n in ("bias", "beta"))
            figures = {
                "batch_mean": mean,
                "batch_var": var,
                "running_mean": running_mean,
                "running_var": running_var,
                "gamma": gamma,
                "beta": beta,
            }
            for what, values in figures.items():
                assert kept[f"channel_0/{name}/{what}", step] == pytest.approx(
                    float(values[0]), rel=1e-4, abs=1e-6
                )
            off = (mean - running_mean).square() / (running_var + 1e-5)
            lag = kept[f"running_lag/{name}/mean", step]
            assert lag == pytest.approx(off.mean().sqrt().item(), rel=1e-4)
            ratio = ((var + 1e-5) / (running_var + 1e-5)).log2()
            assert kept[f"running_lag/{name}/var", step] == pytest.approx(
                ratio.square().mean().sqrt().item(), rel=1e-4
            )
            for percentile in (15, 50, 85):
                # Five deviations of what 4,096 independent values would give; a sample has more.
                share = (
                    (y <= kept[f"activation_input/{number}/p{percentile}", step])
                    .double()
                    .mean()
                    .item()
                )
                p = percentile / 100
                assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / 4_096) + 0.01, (
                    name,
                    percentile,
                )
        gradients = truth.seen["gradients", step]
        for layer in ("conv1", "norm2", "fc3"):
            own = torch.cat(
                [g.flatten() for n, g in gradients.items() if n.startswith(f"{layer}.")]
            )
            assert kept[f"gradient_norm/{layer}", step] == pytest.approx(
                own.norm().item(), rel=1e-5
            )
        whole = torch.cat([g.flatten() for g in gradients.values()]).norm().item()
        assert kept["gradient_norm/all", step] == pytest.approx(whole, rel=1e-5)


def test_monitors_every_nth_step_and_has_no_hooks_in_others(tmp_path):
    class Counted(pl.Callback):
        hooks = {}

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.hooks[trainer.global_step] = number_of_hooks(pl_module)

    model = Classifier()
    kept = watch(tmp_path, model, every_n_steps=3, steps=8, callbacks=[Counted()])
    assert sorted({step for name, step in kept if name == "gradient_norm/all"}) == [0, 3, 6]
    assert sorted({step for name, step in kept if name == "saturated/4"}) == [0, 3, 6]
    assert [Counted.hooks[step] for step in range(8)] == [
        5,
        0,
        0,
        5,
        0,
        0,
        5,
        0,
    ]  # four norms, and one activation
    assert number_of_hooks(model) == 0


def number_of_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_are_gone_when_a_step_fails(tmp_path):
    class Broken(Classifier):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise ZeroDivisionError

    model = Broken()
    with pytest.raises(ZeroDivisionError):
        watch(tmp_path, model)
    assert number_of_hooks(model) == 0


def test_accumulated_gradients_are_logged_once_a_step(tmp_path):
    kept = watch(tmp_path, Classifier(), steps=3, accumulate_grad_batches=2)
    for name in ("gradient_norm/all", "saturated/1", "running_lag/norm1/mean"):
        assert sorted(step for tag, step in kept if tag == name) == [0, 1, 2]


def test_steps_per_second_leaves_validation_out(tmp_path, monkeypatch):
    class Clock(pl.Callback):
        """A step takes an eighth of a second, and a validation 100 seconds."""

        now = 0.0

        def perf_counter(self):
            return self.now

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.now += 0.125

        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.now += 100

    clock = Clock()
    monkeypatch.setattr(norm_monitor, "time", clock)
    settings = {"limit_val_batches": 1, "val_check_interval": 3, "num_sanity_val_steps": 0}
    kept = watch(tmp_path, Classifier(), 5, 20, [clock], **settings)
    speeds = {step: value for (name, step), value in kept.items() if name == "steps_per_second"}
    # A validation is just before step 15.
    assert speeds == {5: 8.0, 10: 8.0}


class Mine(nn.Module):
    """A norm of a user's, with other names and a deviation."""

    def __init__(self, num_features, num_dims):
        super().__init__()
        shape = (1, num_features) + (1,) * (num_dims - 2)
        self.scale = nn.Parameter(torch.full(shape, 2.0))
        self.shift = nn.Parameter(torch.full(shape, 0.5))
        self.register_buffer("my_mean", torch.full(shape, 3.0))
        self.register_buffer("my_std", torch.full(shape, 4.0))

    def forward(self, x):
        return self.scale * (x - x.mean(0, keepdim=True)) + self.shift


def test_a_norm_by_import_path_is_recognized_by_what_it_keeps(tmp_path):
    kept = watch(tmp_path, Classifier(norm=f"{__name__}.Mine", lr=0.0), steps=1)
    for layer in ("norm1", "norm2", "norm3", "norm4"):
        found = {
            what: kept[f"channel_0/{layer}/{what}", 0]
            for what in ("gamma", "beta", "running_mean", "running_var")
        }
        assert found == {"gamma": 2.0, "beta": 0.5, "running_mean": 3.0, "running_var": 16.0}


class Own(Classifier):
    """Its forward pass is a function of the network and the images."""

    def __init__(self, forward, network, **settings):
        super().__init__(norm="builtin", **settings)
        self.network, self.pass_on = network, forward

    def forward(self, images):
        return self.pass_on(self.network, images)


def small(*more):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.BatchNorm1d(10), nn.Sigmoid(), *more)


def test_a_forward_pass_that_is_repeated(tmp_path):
    def checkpointed(network, images):
        return torch.utils.checkpoint.checkpoint(network, images, use_reentrant=False)

    kept = watch(tmp_path, Own(checkpointed, small()), steps=2)
    assert {name for name, _ in kept if name.startswith("saturated")} == {"saturated/1"}


def test_an_optimizer_that_asks_several_times(tmp_path):
    kept = watch(
        tmp_path,
        Own(lambda network, images: network(images), small(), optimizer="LBFGS", lr=0.1),
        steps=1,
    )
    assert {name for name, _ in kept if name.startswith("saturated")} == {"saturated/1"}


def test_a_norm_that_is_called_twice_in_a_step_is_measured_once(tmp_path):
    def twice(network, images):
        return network(images) + network(images + 1)

    kept = watch(tmp_path, Own(twice, small()), steps=1)
    assert kept["channel_0/2/running_mean", 0] == 0  # as it was before the first call
    assert {name for name, _ in kept if name.startswith("saturated")} == {
        "saturated/1",
        "saturated/2",
    }


def test_what_is_given_by_keyword_or_is_empty(tmp_path):
    def odd(network, images):
        assert network[3](torch.empty(0)).numel() == 0
        return network[3](input=network[2](input=network[1](network[0](images))))

    kept = watch(tmp_path, Own(odd, small()), steps=1)
    assert "channel_0/2/batch_mean" in {name for name, _ in kept}
    assert {name for name, _ in kept if name.startswith("saturated")} == {"saturated/1"}


def test_several_optimizers_and_weights_that_are_shared(tmp_path):
    class Two(Classifier):
        def __init__(self):
            super().__init__(norm="none")
            self.automatic_optimization = False
            self.tied = nn.Linear(84, 10)
            self.tied.weight = self.network.fc3.weight

        def configure_optimizers(self):
            first, second = (
                list(self.network.conv1.parameters()),
                list(self.network.fc3.parameters()),
            )
            return torch.optim.SGD(first, 0.1), torch.optim.SGD(second, 0.1)

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
                optimizer.step()
                optimizer.zero_grad()

    kept = watch(tmp_path, Two(), steps=2)
    layers = {
        name: value
        for (name, step), value in kept.items()
        if step == 0 and name.startswith("gradient_norm/")
    }
    assert set(layers) == {"gradient_norm/conv1", "gradient_norm/fc3", "gradient_norm/all"}
    whole = layers.pop("gradient_norm/all")
    assert whole == pytest.approx(math.hypot(*layers.values()), rel=1e-6)


def test_one_monitor_in_two_fits(tmp_path):
    monitor, found = NormMonitor(1), []
    for number in range(2):
        logger = TensorBoardLogger(tmp_path, version=str(number))
        pl.Trainer(
            max_steps=2, logger=logger, callbacks=[monitor], limit_val_batches=0, **QUIET
        ).fit(Classifier(), FashionMNIST("sample"))
        events = events_in(logger.log_dir)
        assert events.Tensors("custom_scalars__config__")
        found.append([tag for tag in events.Tags()["scalars"] if tag != "steps_per_second"])
    assert found[0] == found[1]


def test_an_epoch_that_is_left_out_leaves_no_hooks(tmp_path):
    class Skips(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            return -1

    model = Skips()
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=[NormMonitor(1)],
        logger=MemoryLogger(tmp_path),
        limit_val_batches=0,
        **QUIET,
    )
    trainer.fit(model, FashionMNIST("sample"))
    assert number_of_hooks(model) == 0
    assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2


def test_a_number_of_steps_below_1():
    with pytest.raises(UserError, match="every_n_steps is 0"):
        NormMonitor(0)


def test_a_monitor_of_the_users_own_is_the_only_one(main, tmp_path):
    own = ("--trainer.callbacks+=bn_lightning.NormMonitor", "--trainer.callbacks.every_n_steps", 10)
    code, _, err = main("fit", *QUICK, *own)
    assert code == 0, err
    steps = [event.step for event in events_in(tmp_path / "runs/lenet/0").Scalars("saturated/1")]
    assert steps == [0, 10, 20, 30, 40]


def test_monitoring_changes_nothing(main, tmp_path):
    for name, monitor in (("with", "true"), ("without", "false")):
        code, _, err = main(
            "fit", *QUICK, "--name", name, "--monitor", monitor, "--model.activation", "relu"
        )
        assert code == 0, err
    assert_same_weights(
        *(tmp_path / f"runs/{name}/0/checkpoints/last.ckpt" for name in ("with", "without"))
    )
    tags = events_in(tmp_path / "runs/without/0").Tags()
    assert not any(tags[kind] for kind in ("images", "histograms")) and not tags["graph"]
    assert not [tag for tag in tags["scalars"] if tag.startswith("activation_input")]


def test_a_diverging_run_ends_with_its_own_message(main, tmp_path):
    code, _, err = main(
        "fit", *QUICK, "--model.norm", "none", "--model.activation", "relu", "--model.lr", "1e30"
    )
    assert (code, "is nan" in err or "is inf" in err) == (1, True), err


def test_a_task_without_images(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    trainer = pl.Trainer(max_epochs=1, logger=logger, callbacks=[NormMonitor(2)], **QUIET)
    trainer.fit(Regression(), Table())
    events = events_in(logger.log_dir)
    assert [event.step for event in events.Scalars("running_lag/1/mean")] == [0, 2]
    assert [event.step for event in events.Scalars("gradient_norm/3")] == [0, 2]
    assert {"saturated/1", "channel_0/1/gamma"} <= set(events.Tags()["scalars"])
    assert b"train_rmse" in events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]


def test_a_module_that_is_no_task(tmp_path):
    class Plain(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU())

        def training_step(self, batch, batch_idx):
            return self.layers(batch).square().sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    logger = TensorBoardLogger(tmp_path)
    trainer = pl.Trainer(max_steps=1, logger=logger, callbacks=[NormMonitor(1)], **QUIET)
    trainer.fit(Plain(), DataLoader(torch.randn(5, 2), batch_size=5))
    found = set(events_in(logger.log_dir).Tags()["scalars"])
    assert {"channel_0/layers.1/gamma", "gradient_norm/layers.0", "saturated/1"} <= found
