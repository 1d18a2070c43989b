"""The lag of the running statistics behind the population, as NormMonitor logs it."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from bn_lightning import Classifier, FashionMNIST, NormMonitor, PreciseStatistics
from bn_lightning.monitoring.measurements import population_lag
from tests.conftest import BRIEF, assert_same_weights
from tests.support.logs import QUIET, MemoryLogger, events_in

LAYERS = ["norm1", "norm2", "norm3", "norm4"]
NUM_BATCHES = 3
PRECISE = ("--precise_statistics", NUM_BATCHES, "--trainer.max_epochs", 2)
# The mean and the variance (or standard deviation) of each norm in the state dict.
BUFFERS = {
    "custom": ("running_mean", "running_var"),
    "article": ("moving_mean", "moving_var"),
    "renorm": ("running_mean", "running_std"),
}


def lag_of(running, population, layer, norm="custom"):
    """Return the two lags of a layer of a state dict, computed in float64."""
    mean, var = BUFFERS[norm]
    values = []
    for state in (running, population):
        scale = state[f"{layer}.{var}"].double().flatten()
        variance = scale**2 if var == "running_std" else scale
        values += [state[f"{layer}.{mean}"].double().flatten(), variance + 1e-5]
    last_mean, last_var, true_mean, true_var = values
    of_means = ((true_mean - last_mean) ** 2 / last_var).mean() ** 0.5
    of_variances = ((true_var / last_var).log2() ** 2).mean() ** 0.5
    return of_means.item(), of_variances.item()


def population_scalars(run):
    """Return the values of the population lag in the event files of a run, by tag and step."""
    events = events_in(run)
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("population_lag")]
    return {(tag, event.step): event.value for tag in tags for event in events.Scalars(tag)}


def serialized_charts(run):
    """Return the layout of the charts under Custom Scalars, as TensorBoard stores it."""
    [event] = events_in(run).Tensors("custom_scalars__config__")
    return event.tensor_proto.string_val[0]


# Values


@pytest.mark.parametrize("norm", BUFFERS)
def test_logged_lags_are_those_of_the_checkpoints(main, tmp_path, norm):
    code, _, err = main("fit", *BRIEF, *PRECISE, "--model.norm", norm)
    assert code == 0, err
    run = tmp_path / "runs/lenet/0"
    logged = population_scalars(run)
    # 4 steps per epoch; the last validation follows the last step.
    tags = [f"population_lag/{layer}/{what}" for layer in LAYERS for what in ("mean", "var")]
    assert {*logged} == {(tag, step) for tag in tags for step in (4, 8)}

    last = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    for layer in LAYERS:
        expected = lag_of(last["state_dict"], last["precise_statistics"], f"network.{layer}", norm)
        found = [logged[f"population_lag/{layer}/{what}", 8] for what in ("mean", "var")]
        assert found == pytest.approx(expected, rel=1e-4)
        # After a few steps with momentum 0.1, the running statistics are far behind.
        assert min(found) > 0.1


@pytest.mark.slow
def test_the_population_may_be_the_whole_training_set(tmp_path):
    """Compare with PyTorch's variance and mean of all values in one go."""
    logger, precise = MemoryLogger(tmp_path), PreciseStatistics(1_000)
    callbacks = [NormMonitor(), precise]
    trainer = pl.Trainer(max_epochs=1, logger=logger, callbacks=callbacks, **QUIET)
    model = Classifier("builtin", lr=0.1)
    trainer.fit(model, FashionMNIST("sample"))

    images = torch.cat([images for images, _ in trainer.train_dataloader])
    # Only the convolution precedes norm1. The last validation follows the last step.
    values = model.network.conv1(images).detach().double()
    var, mean = torch.var_mean(values, (0, 2, 3))
    population = {"network.norm1.running_mean": mean, "network.norm1.running_var": var}
    expected = lag_of(precise.running, population, "network.norm1")
    step = trainer.global_step
    found = [logger.logged[f"population_lag/norm1/{what}", step] for what in ("mean", "var")]
    assert len(images) == len(trainer.train_dataloader.indices)
    assert found == pytest.approx(expected, rel=1e-3)


def test_the_definition_for_two_channels():
    running = {"a.norm.running_mean": torch.tensor([1.0, -2.0])}
    running["a.norm.running_var"] = torch.tensor([4.0, 9.0])
    population = {"a.norm.running_mean": torch.tensor([3.0, 4.0])}
    population["a.norm.running_var"] = torch.tensor([16.0, 72.0])
    found = population_lag(running, population, ["a.norm", "a.absent", "norm"])
    assert found == {
        # The means differ by 1 and 2 standard deviations, and the variances by 2 and 3 powers of 2.
        "population_lag/a.norm/mean": pytest.approx((5 / 2) ** 0.5, rel=1e-4),
        "population_lag/a.norm/var": pytest.approx((13 / 2) ** 0.5, rel=1e-4),
    }


# When it is logged


def fit(tmp_path, *callbacks, model=None, **settings):
    """Train for 2 epochs of 3 steps, and return what was logged of the population."""
    logger = MemoryLogger(tmp_path)
    trainer = pl.Trainer(
        **{"max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 1} | settings,
        logger=logger,
        callbacks=[*callbacks],
        **QUIET,
    )
    model = model or Classifier(lr=0.1)
    trainer.fit(model, FashionMNIST("sample", batch_size=16))
    assert any(tag == "val_acc" for tag, _ in logger.logged)
    found = {key: v for key, v in logger.logged.items() if key[0].startswith("population_lag")}
    return trainer, found


def test_the_order_of_the_callbacks_is_irrelevant(tmp_path):
    before = fit(tmp_path, PreciseStatistics(2), NormMonitor())[1]
    after = fit(tmp_path, NormMonitor(), PreciseStatistics(2))[1]
    assert {step for _, step in before} == {3, 6} and len(before) == 16
    assert before.keys() == after.keys()


def test_each_validation_within_an_epoch_is_logged_but_no_sanity_check(tmp_path):
    found = fit(
        tmp_path,
        *(NormMonitor(), PreciseStatistics(2)),
        **{"limit_train_batches": 4, "val_check_interval": 2, "num_sanity_val_steps": 1},
    )[1]
    assert {step for _, step in found} == {2, 4, 6, 8}


def test_a_validation_after_the_fit_is_not_logged(tmp_path):
    callbacks = NormMonitor(), PreciseStatistics(2)
    trainer, found = fit(tmp_path, *callbacks)
    logged = trainer.logger.logged
    keys = {key for key in logged if key[0].startswith("population_lag")}
    trainer.validate(trainer.lightning_module, FashionMNIST("sample", batch_size=16))
    assert {key for key in logged if key[0].startswith("population_lag")} == keys == {*found}


def test_nothing_is_logged_without_the_callback_or_without_a_monitor(tmp_path):
    assert fit(tmp_path, NormMonitor())[1] == {}
    assert fit(tmp_path, PreciseStatistics(2))[1] == {}


def test_norms_without_running_statistics_have_no_lag(tmp_path):
    callbacks = NormMonitor(), PreciseStatistics(2)
    assert fit(tmp_path, *callbacks, model=Classifier("group", lr=0.1))[1] == {}


def test_with_weight_averaging_the_population_is_that_of_the_validated_network(tmp_path):
    class Seen(pl.Callback):
        """Keeps the state of the network in the last validation."""

        def on_validation_epoch_end(self, trainer, pl_module):
            self.state = {n: v.clone() for n, v in pl_module.state_dict().items()}

    averaging, precise, seen = EMAWeightAveraging(decay=0.9), PreciseStatistics(2), Seen()
    # Lightning's callback puts the network's own weights back in `on_validation_epoch_end`.
    _, found = fit(tmp_path, seen, averaging, NormMonitor(), precise)
    assert {step for _, step in found} == {3, 6} and len(found) == 16
    for layer in LAYERS:
        expected = lag_of(precise.running, seen.state, f"network.{layer}")
        lags = [found[f"population_lag/{layer}/{what}", 6] for what in ("mean", "var")]
        assert lags == pytest.approx(expected, rel=1e-4)


def test_a_selection_of_the_layers_is_logged(tmp_path):
    model = Classifier(network="resnet", network_args={"depth": 8, "width": 2}, lr=0.1)
    found = fit(tmp_path, NormMonitor(max_layers=4), PreciseStatistics(2), model=model)[1]
    assert {tag.split("/")[1] for tag, _ in found} == {
        *("norm", "blocks.0.norm2", "blocks.1.norm2", "blocks.2.norm2"),
    }


# Commands


@pytest.mark.slow
def test_charts_exist_only_with_the_callback(main, tmp_path):
    for name, more in (
        ("with", PRECISE),
        ("without", ()),
        ("unmonitored", (*PRECISE, "--monitor", "false")),
    ):
        code, _, err = main("fit", *BRIEF, "--name", name, *more)
        assert code == 0, err
    runs = tmp_path / "runs"
    assert b"population_lag/.*/var" in serialized_charts(runs / "with/0")
    assert b"running_lag/.*/var" in serialized_charts(runs / "without/0")
    assert b"population" not in serialized_charts(runs / "without/0")
    assert population_scalars(runs / "with/0") and not population_scalars(runs / "without/0")
    assert not population_scalars(runs / "unmonitored/0")
    assert_same_weights(
        *(runs / f"{name}/0/checkpoints/last.ckpt" for name in ("with", "unmonitored"))
    )
