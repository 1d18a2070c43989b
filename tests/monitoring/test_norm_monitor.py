"""When NormMonitor monitors, what it logs, and that it does not change the run."""

import math
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from bn_lightning import Classifier, FashionMNIST, NormMonitor, UserError
from bn_lightning.monitoring import norm_monitor
from bn_lightning.training import channels_last
from tests.conftest import BRIEF, assert_same_weights
from tests.projects.friedman.experiment import Regression, Table
from tests.support.logs import QUIET, MemoryLogger, events_in


def logged_by_monitor(tmp_path, model, every_n_steps=1, steps=4, callbacks=(), **settings):
    """Train a few steps, and return what was logged, by tag and step."""
    logger = MemoryLogger(tmp_path)
    trainer = pl.Trainer(
        max_steps=steps,
        logger=logger,
        callbacks=[NormMonitor(every_n_steps), *callbacks],
        **{"limit_val_batches": 0} | QUIET | settings,
    )
    trainer.fit(model, FashionMNIST("sample"))
    return logger.logged


class Recorder(pl.Callback):
    """Records inputs, outputs and states of the norm layers, with its own hooks."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.step = trainer.global_step
        self.seen = getattr(self, "seen", {})
        for name in ("norm1", "norm2", "norm3", "norm4"):
            module = getattr(pl_module.network, name)

            def before(module, args, name=name):
                state = {n: v.clone().flatten() for n, v in module.state_dict().items()}
                self.seen["before", name, self.step] = state

            def after(module, args, output, name=name):
                self.seen[name, self.step] = args[0].detach().clone(), output.detach().clone()

            module.register_forward_pre_hook(before)
            module.register_forward_hook(after)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = {n: p.grad.clone() for n, p in pl_module.network.named_parameters()}
        self.seen["gradients", self.step] = gradients


@pytest.mark.parametrize("norm", ["custom", "builtin", "article", "renorm"])
def test_logged_values_are_those_of_the_network(tmp_path, norm):
    recorder = Recorder()
    logged = logged_by_monitor(tmp_path, Classifier(norm=norm), steps=3, callbacks=[recorder])
    for step in range(3):
        for number, name in enumerate(("norm1", "norm2", "norm3", "norm4"), 1):
            x, y = recorder.seen[name, step]
            before = recorder.seen["before", name, step]
            dims = [d for d in range(x.dim()) if d != 1]
            var, mean = torch.var_mean(x.double(), dims, correction=0)
            running_mean = next(v for n, v in before.items() if "mean" in n)
            running_var = next(
                v if "var" in n else v.square()
                for n, v in before.items()
                if "var" in n or "std" in n
            )
            expected = {
                "batch_mean": mean,
                "batch_var": var,
                "running_mean": running_mean,
                "running_var": running_var,
                "gamma": next(v for n, v in before.items() if n in ("weight", "gamma")),
                "beta": next(v for n, v in before.items() if n in ("bias", "beta")),
            }
            for quantity, values in expected.items():
                found = logged[f"channel_0/{name}/{quantity}", step]
                assert found == pytest.approx(float(values[0]), rel=1e-4, abs=1e-6)

            distance = (mean - running_mean).square() / (running_var + 1e-5)
            lag = logged[f"running_lag/{name}/mean", step]
            assert lag == pytest.approx(distance.mean().sqrt().item(), rel=1e-4)
            ratio = ((var + 1e-5) / (running_var + 1e-5)).log2()
            lag = logged[f"running_lag/{name}/var", step]
            assert lag == pytest.approx(ratio.square().mean().sqrt().item(), rel=1e-4)

            for percentile in (15, 50, 85):
                level = logged[f"activation_input/{number}/p{percentile}", step]
                fraction = (y <= level).double().mean().item()
                # Five standard errors of a sample of 4,096 independent values, plus 1%.
                p = percentile / 100
                tolerance = 5 * math.sqrt(p * (1 - p) / 4_096) + 0.01
                assert abs(fraction - p) < tolerance, (name, percentile)

        gradients = recorder.seen["gradients", step]
        for layer in ("conv1", "norm2", "fc3"):
            own = [g.flatten() for n, g in gradients.items() if n.startswith(f"{layer}.")]
            found = logged[f"gradient_norm/{layer}", step]
            assert found == pytest.approx(torch.cat(own).norm().item(), rel=1e-5)
        total = torch.cat([g.flatten() for g in gradients.values()]).norm().item()
        assert logged["gradient_norm/all", step] == pytest.approx(total, rel=1e-5)


def test_all_layers_of_lenet_are_monitored(trained):
    folder, printed = trained
    tags = events_in(folder).Tags()
    norms = ("norm1", "norm2", "norm3", "norm4")
    layers = ("all", *norms, "conv1", "conv2", "fc1", "fc2", "fc3")
    quantities = ("gamma", "beta", "batch_mean", "batch_var", "running_mean", "running_var")
    expected = {f"channel_0/{name}/{what}" for name in norms for what in quantities}
    expected |= {f"running_lag/{name}/{what}" for name in norms for what in ("mean", "var")}
    expected |= {f"activation_input/{n}/p{p}" for n in (1, 2, 3, 4) for p in (15, 50, 85)}
    expected |= {f"saturated/{n}" for n in (1, 2, 3, 4)}
    expected |= {f"gradient_norm/{name}" for name in layers}
    groups = ("channel_0", "running_lag", "activation_input", "saturated", "gradient_norm")
    assert {tag for tag in tags["scalars"] if tag.startswith(groups)} == expected
    assert "monitors" not in printed
    assert not [tag for tag in tags["tensors"] if "monitored_layers" in tag]


def test_hooks_are_registered_in_every_nth_step_only(tmp_path):
    class Counted(pl.Callback):
        hooks = {}

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.hooks[trainer.global_step] = number_of_hooks(pl_module)

    model = Classifier()
    logged = logged_by_monitor(tmp_path, model, every_n_steps=3, steps=8, callbacks=[Counted()])
    assert sorted({step for name, step in logged if name == "gradient_norm/all"}) == [0, 3, 6]
    assert sorted({step for name, step in logged if name == "saturated/4"}) == [0, 3, 6]
    # One hook for each of four norms, and one for the activation, which is shared.
    assert [Counted.hooks[step] for step in range(8)] == [5, 0, 0, 5, 0, 0, 5, 0]
    assert number_of_hooks(model) == 0


def number_of_hooks(model):
    """Return the number of hooks, without those of the channels-last format."""
    hooks = [h for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]
    return sum(hook is not channels_last._convert for group in hooks for hook in group.values())


def test_hooks_are_removed_when_a_step_fails(tmp_path):
    class Broken(Classifier):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise ZeroDivisionError

    model = Broken()
    with pytest.raises(ZeroDivisionError):
        logged_by_monitor(tmp_path, model)
    assert number_of_hooks(model) == 0


def test_with_gradient_accumulation_each_step_is_logged_once(tmp_path):
    logged = logged_by_monitor(tmp_path, Classifier(), steps=3, accumulate_grad_batches=2)
    for name in ("gradient_norm/all", "saturated/1", "running_lag/norm1/mean"):
        assert sorted(step for tag, step in logged if tag == name) == [0, 1, 2]


def test_steps_per_second_excludes_validation(tmp_path, monkeypatch):
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
    logged = logged_by_monitor(tmp_path, Classifier(), 5, 20, [clock], **settings)
    speeds = {step: value for (name, step), value in logged.items() if name == "steps_per_second"}
    # Validation runs just before step 15.
    assert speeds == {5: 8.0, 10: 8.0}


class Mine(nn.Module):
    """A user's norm, with other names, and a standard deviation in place of a variance."""

    def __init__(self, num_features, num_dims):
        super().__init__()
        shape = (1, num_features) + (1,) * (num_dims - 2)
        self.scale = nn.Parameter(torch.full(shape, 2.0))
        self.shift = nn.Parameter(torch.full(shape, 0.5))
        self.register_buffer("my_mean", torch.full(shape, 3.0))
        self.register_buffer("my_std", torch.full(shape, 4.0))

    def forward(self, x):
        return self.scale * (x - x.mean(0, keepdim=True)) + self.shift


def test_a_norm_by_import_path_is_recognized_by_its_tensors(tmp_path):
    logged = logged_by_monitor(tmp_path, Classifier(norm=f"{__name__}.Mine", lr=0.0), steps=1)
    for layer in ("norm1", "norm2", "norm3", "norm4"):
        found = {
            quantity: logged[f"channel_0/{layer}/{quantity}", 0]
            for quantity in ("gamma", "beta", "running_mean", "running_var")
        }
        assert found == {"gamma": 2.0, "beta": 0.5, "running_mean": 3.0, "running_var": 16.0}


def classifier_with(forward, network, **settings):
    """Return a classifier whose forward pass is `forward(network, images)`."""
    model = Classifier(norm="builtin", **settings)
    model.network = network
    model.forward = partial(forward, network)
    return model


def small(*more):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.BatchNorm1d(10), nn.Sigmoid(), *more)


def test_a_checkpointed_forward_pass_is_measured_once(tmp_path):
    def checkpointed(network, images):
        return torch.utils.checkpoint.checkpoint(network, images, use_reentrant=False)

    logged = logged_by_monitor(tmp_path, classifier_with(checkpointed, small()), steps=2)
    assert {name for name, _ in logged if name.startswith("saturated")} == {"saturated/1"}


def test_only_the_first_closure_call_of_a_step_is_measured(tmp_path):
    def forward(network, images):
        return network(images)

    model = classifier_with(forward, small(), optimizer="LBFGS", lr=0.1)
    logged = logged_by_monitor(tmp_path, model, steps=1)
    assert {name for name, _ in logged if name.startswith("saturated")} == {"saturated/1"}


def test_a_norm_that_is_called_twice_is_measured_once(tmp_path):
    def twice(network, images):
        return network(images) + network(images + 1)

    logged = logged_by_monitor(tmp_path, classifier_with(twice, small()), steps=1)
    assert logged["channel_0/2/running_mean", 0] == 0  # before the first call
    assert {name for name, _ in logged if name.startswith("saturated")} == {
        "saturated/1",
        "saturated/2",
    }


def test_inputs_may_be_keyword_arguments_or_empty(tmp_path):
    def odd(network, images):
        assert network[3](torch.empty(0)).numel() == 0
        return network[3](input=network[2](input=network[1](network[0](images))))

    logged = logged_by_monitor(tmp_path, classifier_with(odd, small()), steps=1)
    assert "channel_0/2/batch_mean" in {name for name, _ in logged}
    assert {name for name, _ in logged if name.startswith("saturated")} == {"saturated/1"}


def test_several_optimizers_and_shared_weights_are_measured(tmp_path):
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

    logged = logged_by_monitor(tmp_path, Two(), steps=2)
    layers = {
        name: value
        for (name, step), value in logged.items()
        if step == 0 and name.startswith("gradient_norm/")
    }
    assert set(layers) == {"gradient_norm/conv1", "gradient_norm/fc3", "gradient_norm/all"}
    total = layers.pop("gradient_norm/all")
    assert total == pytest.approx(math.hypot(*layers.values()), rel=1e-6)


def test_one_monitor_can_be_used_for_two_fits(tmp_path):
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


def test_hooks_are_removed_when_an_epoch_is_skipped(tmp_path):
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


def test_invalid_settings_are_refused():
    with pytest.raises(UserError, match="every_n_steps is 0"):
        NormMonitor(0)
    with pytest.raises(UserError, match="max_layers is 1; it must be at least 2"):
        NormMonitor(max_layers=1)


def test_a_users_monitor_replaces_the_default(main, tmp_path):
    own = ("--trainer.callbacks+=bn_lightning.NormMonitor", "--trainer.callbacks.every_n_steps", 3)
    own += ("--trainer.callbacks.max_layers", 3)
    code, out, err = main("fit", *BRIEF, *own)
    assert code == 0, err
    assert out.count("NormMonitor monitors 3 of 4 norm layers: norm1, norm3, norm4\n") == 1
    steps = [event.step for event in events_in(tmp_path / "runs/lenet/0").Scalars("saturated/1")]
    assert steps == [0, 3, 6]


def test_monitoring_does_not_change_the_weights(main, tmp_path):
    for name, monitor in (("with", "true"), ("without", "false")):
        code, _, err = main(
            "fit", *BRIEF, "--name", name, "--monitor", monitor, "--model.activation", "relu"
        )
        assert code == 0, err
    assert_same_weights(
        *(tmp_path / f"runs/{name}/0/checkpoints/last.ckpt" for name in ("with", "without"))
    )
    tags = events_in(tmp_path / "runs/without/0").Tags()
    assert not any(tags[kind] for kind in ("images", "histograms")) and not tags["graph"]
    assert not [tag for tag in tags["scalars"] if tag.startswith("activation_input")]


def test_a_diverging_run_reports_the_non_finite_loss(main, tmp_path):
    code, _, err = main(
        "fit", *BRIEF, "--model.norm", "none", "--model.activation", "relu", "--model.lr", "1e30"
    )
    assert (code, "is nan" in err or "is inf" in err) == (1, True), err


def test_a_task_without_images_is_monitored(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    trainer = pl.Trainer(max_epochs=1, logger=logger, callbacks=[NormMonitor(2)], **QUIET)
    trainer.fit(Regression(), Table())
    events = events_in(logger.log_dir)
    assert [event.step for event in events.Scalars("running_lag/1/mean")] == [0, 2]
    assert [event.step for event in events.Scalars("gradient_norm/3")] == [0, 2]
    assert {"saturated/1", "channel_0/1/gamma"} <= set(events.Tags()["scalars"])
    assert b"train_rmse" in events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]


def test_a_plain_lightning_module_is_monitored(tmp_path):
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


def test_a_layer_that_cannot_be_measured_does_not_end_the_run(tmp_path, capsys):
    class Sparse(Regression):
        def forward(self, inputs):
            # No values can be taken from a sparse tensor by their position.
            self.gate(inputs.detach().to_sparse())
            return super().forward(inputs)

    model = Sparse()
    model.gate = nn.ReLU()
    logger = TensorBoardLogger(tmp_path)
    trainer = pl.Trainer(max_epochs=1, logger=logger, callbacks=[NormMonitor(1)], **QUIET)
    trainer.fit(model, Table())
    assert trainer.global_step > 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert line.startswith("WARNING: Norm layers are not monitored in the rest of this run: ")
