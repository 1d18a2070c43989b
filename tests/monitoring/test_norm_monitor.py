import json
import math
import time

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F

from bn_lightning import BatchNorm, Classifier, ClosingPictures, FashionMNIST, NormMonitor, UserError
from bn_lightning.data.fashion_mnist import CLASSES
from bn_lightning.norms import recognition, registry
from tests.conftest import QUICK, assert_same_weights

QUIET = {
    "accelerator": "cpu", "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


def curves(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0, "images": 0})
    events.Reload()
    return events


class Kept(CSVLogger):
    """Keeps what is logged in memory."""

    def __init__(self, folder):
        super().__init__(folder)
        self.kept = {}

    def log_metrics(self, metrics, step=None):
        for name, value in metrics.items():
            self.kept[name, step] = value


def watch(tmp_path, model, every_n_steps=1, steps=4, callbacks=(), **settings):
    logger = Kept(tmp_path)
    trainer = pl.Trainer(
        max_steps=steps, logger=logger, callbacks=[NormMonitor(every_n_steps), *callbacks], limit_val_batches=0,
        **QUIET, **settings,
    )  # fmt: skip
    trainer.fit(model, FashionMNIST("sample"))
    return logger.kept


class Truth(pl.Callback):
    """What goes through the network, by hooks of its own."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.step = trainer.global_step
        self.seen = getattr(self, "seen", {})
        for name in ("norm1", "norm2", "norm3", "norm4"):
            module = getattr(pl_module.network, name)

            def hook(module, args, output, name=name):
                kept = {n: v.detach().clone().flatten() for n, v in module.state_dict().items()}
                self.seen[name, self.step] = (args[0].detach().clone(), output.detach().clone(), kept)

            def before(module, args, name=name):
                self.seen["before", name, self.step] = {n: v.clone().flatten() for n, v in module.state_dict().items()}

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
            running_var = next(v if "var" in n else v.square() for n, v in before.items() if "var" in n or "std" in n)
            gamma = next(v for n, v in before.items() if n in ("weight", "gamma"))
            beta = next(v for n, v in before.items() if n in ("bias", "beta"))
            for what, values in {
                "batch_mean": mean, "batch_var": var, "running_mean": running_mean, "running_var": running_var,
                "gamma": gamma, "beta": beta,
            }.items():  # fmt: skip
                assert kept[f"channel_0/{name}/{what}", step] == pytest.approx(float(values[0]), rel=1e-4, abs=1e-6)
            off = (mean - running_mean).square() / (running_var + 1e-5)
            lag = kept[f"running_lag/{name}/mean", step]
            assert lag == pytest.approx(off.mean().sqrt().item(), rel=1e-4)
            ratio = ((var + 1e-5) / (running_var + 1e-5)).log2()
            assert kept[f"running_lag/{name}/var", step] == pytest.approx(ratio.square().mean().sqrt().item(), rel=1e-4)
            for percentile in (15, 50, 85):
                # A sample of 4,096 values or more: within what 4,096 independent ones would give, five deviations.
                share = (y <= kept[f"activation_input/{number}/p{percentile}", step]).double().mean().item()
                p = percentile / 100
                assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / 4_096) + 0.01, (name, percentile)
        gradients = truth.seen["gradients", step]
        for layer in ("conv1", "norm2", "fc3"):
            own = torch.cat([g.flatten() for n, g in gradients.items() if n.startswith(f"{layer}.")])
            assert kept[f"gradient_norm/{layer}", step] == pytest.approx(own.norm().item(), rel=1e-5)
        whole = torch.cat([g.flatten() for g in gradients.values()]).norm().item()
        assert kept["gradient_norm/all", step] == pytest.approx(whole, rel=1e-5)


class Known(pl.LightningModule):
    """An activation that is given known values."""

    def __init__(self, activation, values):
        super().__init__()
        self.phi = activation
        self.values = nn.Parameter(values)

    def training_step(self, batch, batch_idx):
        return self.phi(self.values.clone()).square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize(
    ("activation", "edges"),
    [
        # sigmoid'(x) = s (1 - s) is 0.05 / 4 at |x| = 4.3567; tanh'(x) = 1 - tanh(x)^2 is 0.05 at |x| = 2.1783.
        (nn.Sigmoid(), (-4.3567, 4.3567)),
        (nn.Tanh(), (-2.1783, 2.1783)),
        (nn.ReLU(), (0, math.inf)),
        (nn.ReLU(inplace=True), (0, math.inf)),
        (nn.Hardtanh(), (-1, 1)),
    ],
)
def test_saturation_and_percentiles_in_closed_form(tmp_path, activation, edges):
    values = torch.linspace(-10, 10, 8_001)
    logger = Kept(tmp_path)
    trainer = pl.Trainer(max_steps=1, logger=logger, callbacks=[NormMonitor(1)], **QUIET)
    trainer.fit(Known(activation, values), [0])
    saturated = ((values < edges[0]) | (values > edges[1])).double().mean().item()
    assert logger.kept["saturated/1", 0] == pytest.approx(saturated, abs=0.001)
    for percentile in (15, 50, 85):
        assert logger.kept[f"activation_input/1/p{percentile}", 0] == pytest.approx(percentile / 5 - 10, abs=0.01)


def test_looks_at_the_steps_of_its_number_and_has_no_hooks_in_others(tmp_path):
    class Counted(pl.Callback):
        hooks = {}

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.hooks[trainer.global_step] = number_of_hooks(pl_module)

    model = Classifier()
    kept = watch(tmp_path, model, every_n_steps=3, steps=8, callbacks=[Counted()])
    assert sorted({step for name, step in kept if name == "gradient_norm/all"}) == [0, 3, 6]
    assert sorted({step for name, step in kept if name == "saturated/4"}) == [0, 3, 6]
    assert [Counted.hooks[step] for step in range(8)] == [5, 0, 0, 5, 0, 0, 5, 0]  # four norms, and one activation
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


def test_steps_per_second_leaves_validation_out(tmp_path):
    class Slow(pl.Callback):
        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx):
            time.sleep(1)

    logger = Kept(tmp_path)
    trainer = pl.Trainer(
        max_steps=20, logger=logger, callbacks=[NormMonitor(5), Slow()], limit_val_batches=1, val_check_interval=3,
        num_sanity_val_steps=0, **QUIET,
    )  # fmt: skip
    trainer.fit(Classifier(), FashionMNIST("sample"))
    assert all(value > 5 for (name, _), value in logger.kept.items() if name == "steps_per_second")
    assert any(name == "steps_per_second" for name, _ in logger.kept)


class Mine(nn.Module):
    """A norm that no other is: statistics of its own, by other names."""

    def __init__(self, num_features, num_dims):
        super().__init__()
        shape = (1, num_features) + (1,) * (num_dims - 2)
        self.scale = nn.Parameter(torch.full(shape, 2.0))
        self.shift = nn.Parameter(torch.full(shape, 0.5))
        self.register_buffer("my_mean", torch.full(shape, 3.0))
        self.register_buffer("my_std", torch.full(shape, 4.0))

    def forward(self, x):
        return self.scale * (x - x.mean(0, keepdim=True)) + self.shift


def test_a_norm_by_import_path_is_found_by_what_it_keeps(tmp_path):
    kept = watch(tmp_path, Classifier(norm=f"{__name__}.Mine", lr=0.0), steps=1)
    for layer in ("norm1", "norm2", "norm3", "norm4"):
        found = {
            what: kept[f"channel_0/{layer}/{what}", 0] for what in ("gamma", "beta", "running_mean", "running_var")
        }
        assert found == {"gamma": 2.0, "beta": 0.5, "running_mean": 3.0, "running_var": 16.0}


@pytest.mark.parametrize("norm", registry.NORMS)
def test_layers_are_found_whatever_their_class(norm):
    found = list(recognition.layers(Classifier(norm=norm)))
    assert found == ([] if norm == "none" else [f"network.norm{n}" for n in (1, 2, 3, 4)])


def test_no_layer_without_statistics_of_channels_is_taken_for_a_norm():
    others = (nn.Conv2d(1, 6, 5), nn.PReLU(6), nn.Linear(4, 4, bias=False), nn.Embedding(5, 3), nn.GELU())
    with_one = (nn.Linear(4, 1), nn.Linear(1, 4), nn.Conv1d(1, 1, 3), nn.Embedding(1, 3), nn.BCELoss(torch.ones(3)))
    assert recognition.layers(nn.Sequential(*others, *with_one)) == {}
    assert list(recognition.layers(nn.Sequential(nn.GroupNorm(2, 6), nn.InstanceNorm2d(6, affine=True)))) == ["0", "1"]


@pytest.mark.parametrize("norm", [BatchNorm, nn.BatchNorm2d])
def test_one_channel(norm):
    layer = norm(1)
    layer(torch.randn(5, 1, 3, 3))
    assert recognition.by_channel(layer.state_dict())["gamma"] == 1  # and not the count of batches


class Own(Classifier):
    """Its forward pass by what is given: a function of the network and the images."""

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
    kept = watch(tmp_path, Own(lambda network, images: network(images), small(), optimizer="LBFGS", lr=0.1), steps=1)
    assert {name for name, _ in kept if name.startswith("saturated")} == {"saturated/1"}


def test_a_norm_that_is_called_twice_in_a_step_is_looked_at_once(tmp_path):
    def twice(network, images):
        return network(images) + network(images + 1)

    kept = watch(tmp_path, Own(twice, small()), steps=1)
    assert kept["channel_0/2/running_mean", 0] == 0  # as it was before the first call
    assert {name for name, _ in kept if name.startswith("saturated")} == {"saturated/1", "saturated/2"}


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
            first, second = list(self.network.conv1.parameters()), list(self.network.fc3.parameters())
            return torch.optim.SGD(first, 0.1), torch.optim.SGD(second, 0.1)

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
                optimizer.step()
                optimizer.zero_grad()

    kept = watch(tmp_path, Two(), steps=2)
    layers = {name: value for (name, step), value in kept.items() if step == 0 and name.startswith("gradient_norm/")}
    assert set(layers) == {"gradient_norm/conv1", "gradient_norm/fc3", "gradient_norm/all"}
    whole = layers.pop("gradient_norm/all")
    assert whole == pytest.approx(math.hypot(*layers.values()), rel=1e-6)


def test_one_monitor_in_two_fits(tmp_path):
    monitor, found = NormMonitor(1), []
    for number in range(2):
        logger = TensorBoardLogger(tmp_path, version=str(number))
        pl.Trainer(max_steps=2, logger=logger, callbacks=[monitor], limit_val_batches=0, **QUIET).fit(
            Classifier(), FashionMNIST("sample")
        )
        events = curves(logger.log_dir)
        assert events.Tensors("custom_scalars__config__")
        found.append([tag for tag in events.Tags()["scalars"] if tag != "steps_per_second"])
    assert found[0] == found[1]


def test_an_epoch_that_is_left_out_leaves_no_hooks(tmp_path):
    class Skips(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            return -1

    model = Skips()
    trainer = pl.Trainer(max_epochs=1, callbacks=[NormMonitor(1)], logger=Kept(tmp_path), limit_val_batches=0, **QUIET)
    trainer.fit(model, FashionMNIST("sample"))
    assert number_of_hooks(model) == 0
    assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2


def test_a_number_of_steps_that_is_none():
    with pytest.raises(UserError, match="every_n_steps is 0"):
        NormMonitor(0)


class Untraceable(nn.Module):
    def __init__(self, num_features, num_dims):
        super().__init__()

    def forward(self, x):
        if torch.jit.is_tracing():
            raise RuntimeError("not in a trace")
        return x


def test_a_network_that_cannot_be_traced_ends_its_run_all_the_same(main, tmp_path):
    with pytest.warns(UserWarning, match="no graph of the network, which cannot be traced: RuntimeError: not in a"):
        code, out, _ = main("fit", *QUICK, "--model.norm", f"{__name__}.Untraceable", "--trainer.max_epochs", 1)
    assert code == 0
    assert "test acc" in out and (tmp_path / "runs/lenet/0/result.json").exists()


def test_a_monitor_of_the_users_own_is_the_only_one(main, tmp_path):
    own = ("--trainer.callbacks+=bn_lightning.NormMonitor", "--trainer.callbacks.every_n_steps", 10)
    code, _, err = main("fit", *QUICK, *own)
    assert code == 0, err
    steps = [event.step for event in curves(tmp_path / "runs/lenet/0").Scalars("saturated/1")]
    assert steps == [0, 10, 20, 30, 40]


def test_nothing_is_changed_by_looking(main, tmp_path):
    for name, monitor in (("with", "true"), ("without", "false")):
        code, _, err = main("fit", *QUICK, "--name", name, "--monitor", monitor, "--model.activation", "relu")
        assert code == 0, err
    assert_same_weights(*(tmp_path / f"runs/{name}/0/checkpoints/last.ckpt" for name in ("with", "without")))
    tags = curves(tmp_path / "runs/without/0").Tags()
    assert not any(tags[kind] for kind in ("images", "histograms")) and not tags["graph"]
    assert not [tag for tag in tags["scalars"] if tag.startswith("activation_input")]


def test_what_tensorboard_is_given(trained):
    folder, _ = trained
    events = curves(folder)
    tags = events.Tags()
    assert tags["images"] == ["confusion_matrix", "most_confident_mistakes", "first_layer_filters"]
    assert {f"{what}/norm{n}" for what in ("gamma", "beta", "batch_mean", "running_var") for n in (1, 2, 3, 4)} <= set(
        tags["histograms"]
    )
    assert tags["graph"]
    graph = events.Graph()
    assert any("BatchNorm[norm1]" in node.name for node in graph.node)
    assert [event.step for event in events.Scalars("activation_input/4/p50")] == [0]
    assert len(events.Tensors("custom_scalars__config__")) == 1
    assert [len(events.Histograms("gamma/norm1")), events.Histograms("gamma/norm1")[0].histogram_value.num] == [1, 6]


def test_confusion_is_that_of_the_test(trained, main):
    folder, _ = trained
    model = Classifier.load_from_checkpoint(folder / "checkpoints/best.ckpt", weights_only=True, map_location="cpu")
    data = FashionMNIST("sample")
    pl.Trainer(logger=False, **QUIET).test(model, data, verbose=False)
    with torch.no_grad():
        model.eval()
        guess = model(data.images.test_images.unsqueeze(1) / 255).argmax(1)
    truth = data.images.test_labels
    counts = np.zeros((10, 10), dtype=int)
    np.add.at(counts, (truth.numpy(), guess.numpy()), 1)
    assert (model.confusion.numpy() == counts).all()
    result = json.loads((folder / "result.json").read_text())
    assert counts.trace() / counts.sum() == pytest.approx(result["test_acc"])


def test_most_confident_mistakes(tmp_path, monkeypatch):
    from bn_lightning.monitoring import drawing

    drawn = []
    monkeypatch.setattr(drawing, "grid", lambda images, captions, *rest, **named: drawn.append((images, captions)))
    monkeypatch.setattr(drawing, "filters", lambda weight: None)
    torch.manual_seed(0)
    model, data = Classifier(), FashionMNIST("sample", batch_size=300, normalize=True)
    trainer = pl.Trainer(logger=TensorBoardLogger(tmp_path), callbacks=[ClosingPictures(mistakes=7)], **QUIET)
    trainer.test(model, data, verbose=False)
    [(images, captions)] = drawn
    with torch.no_grad():
        x = (data.images.test_images.unsqueeze(1) / 255 - 0.2860) / 0.3530
        probability, guess = F.softmax(model.eval()(x), 1).max(1)
    wrong = guess != data.images.test_labels
    order = (probability * wrong).argsort(descending=True)[:7]
    assert captions == [
        f"{CLASSES[guess[i]]} {probability[i]:.1%}\nis {CLASSES[data.images.test_labels[i]]}" for i in order
    ]
    assert torch.equal(images, data.images.test_images[order])


def test_a_diverging_run_is_told_by_its_own_message(main, tmp_path):
    code, _, err = main("fit", *QUICK, "--model.norm", "none", "--model.activation", "relu", "--model.lr", "1e30")
    assert (code, "is nan" in err or "is inf" in err) == (1, True), err
