"""Precise statistics of averaged weights: EMA and SWA."""

import copy
import shutil

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from bn_lightning import Classifier, FashionMNIST, PreciseStatistics
from bn_lightning.training.averaging import AverageFromStart, StochasticWeightAveraging
from tests.conftest import BRIEF, run_here, weights
from tests.support import kills
from tests.support.plain_training import Residual, best, fit, inputs_of, shuffled
from tests.support.precise import as_builtin, assert_statistics, batches_of
from tests.support.runs import result_of

# config.yaml cannot represent the default device of Lightning's callback.
pytestmark = [
    pytest.mark.filterwarnings("ignore:\\s*Unable to serialize instance cpu"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]

FAST = (*BRIEF, "--monitor", "false", "--model.lr", "0.2")
PRECISE = ("--precise_statistics", 3)
LAST, BEST = "checkpoints/last.ckpt", "checkpoints/best.ckpt"
EMA = (
    "--trainer.callbacks+=lightning.pytorch.callbacks.EMAWeightAveraging",
    *("--trainer.callbacks.decay", "0.7"),
)
SWA = (
    "--trainer.callbacks+=bn_lightning.StochasticWeightAveraging",
    *("--trainer.callbacks.swa_lrs", "0.1", "--trainer.callbacks.swa_epoch_start", "1"),
)


def saved(folder, name=LAST):
    return torch.load(folder / name, weights_only=True)


def pair(cwd, *settings):
    """Run fit without and with the flag, and return the folders."""
    for name, flag in (("without", ()), ("with", PRECISE)):
        run_here("fit", *FAST, *settings, *flag, "--name", name, cwd=cwd)
    return cwd / "runs/without/0", cwd / "runs/with/0"


def assert_same_training(one, other):
    """Compare the network, the average with its running statistics, and the optimizer."""
    compared = ("state_dict", "current_model_state", "averaging_state", "optimizer_states")
    first, second = ({name: saved(it).get(name) for name in compared} for it in (one, other))
    assert list(kills.differences(first, second)) == []


def assert_precise(state):
    """Assert that a LeNet has the statistics of the promised batches."""
    data = FashionMNIST("sample", batch_size=32)
    data.prepare_data()
    data.setup("fit")
    state = {name.removeprefix("network."): value for name, value in state.items()}
    assert_statistics(state, as_builtin(state), batches_of(data, 3))


def final_weights(folder):
    checkpoint = saved(folder)
    return checkpoint["state_dict"] | checkpoint["precise_statistics"]


# Exponential moving average


@pytest.mark.parametrize(
    ("norm", "settings"),
    [
        pytest.param("custom", (), id="custom"),
        pytest.param(
            "article",
            ("--trainer.val_check_interval", "0.5"),
            id="article",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "builtin",
            ("--trainer.callbacks.use_buffers", "false"),
            id="without buffers",
            marks=pytest.mark.slow,
        ),
        pytest.param("custom", ("--trainer.max_steps", 6), id="max_steps", marks=pytest.mark.slow),
        pytest.param(
            "custom",
            ("--trainer.callbacks.update_starting_at_epoch", 0),
            id="also after an epoch",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_average_is_unchanged_and_best_ckpt_has_its_statistics(tmp_path, norm, settings):
    without, precise = pair(tmp_path, "--model.norm", norm, *EMA, *settings)
    assert_same_training(without, precise)
    assert_precise(weights(precise / BEST))
    assert_precise(final_weights(precise))
    # They are those of the average, and not of the network.
    content, kept = saved(precise, BEST), "network.conv1.weight"
    assert not torch.equal(content["state_dict"][kept], content["current_model_state"][kept])


@pytest.mark.slow
def test_the_best_average_is_validated_with_its_statistics(main, tmp_path):
    assert main("fit", *FAST, *EMA, *PRECISE)[0] == 0
    folder = tmp_path / "runs/lenet/0"
    found = max(kills.curves(folder)["val_acc"], key=lambda point: point[1])[1]
    limits = ("--trainer.limit_val_batches", 2, "--trainer.limit_test_batches", 2)
    _, out, _ = main("validate", "--ckpt_path", folder / BEST, *limits)
    assert f"val_acc    {found:.4f}" in out
    _, out, _ = main("test", "--ckpt_path", folder / BEST, *limits)
    assert f"test_acc   {result_of(folder)['test_acc']:.4f}" in out


@pytest.mark.slow
def test_before_its_first_update_the_average_is_the_network(main, tmp_path):
    late = ("--trainer.callbacks.update_starting_at_step", 1_000)
    assert main("fit", *FAST, *PRECISE, "--name", "plain")[0] == 0
    assert main("fit", *FAST, *PRECISE, *EMA, *late, "--name", "average")[0] == 0
    plain, average = (tmp_path / f"runs/{name}/0" for name in ("plain", "average"))
    for evaluated in (final_weights, lambda folder: weights(folder / BEST)):
        assert list(kills.differences(evaluated(plain), evaluated(average))) == []
    for name in ("val_acc", "val_loss", "test_acc", "test_loss"):
        assert result_of(plain)[name] == result_of(average)[name], name


@pytest.mark.slow
def test_an_average_that_starts_late_has_its_statistics(tmp_path):
    """The first update is after the first validation."""
    late = ("--trainer.callbacks.update_starting_at_step", 5)
    without, precise = pair(tmp_path, *EMA, *late)
    assert_same_training(without, precise)
    assert_precise(weights(precise / BEST))
    assert_precise(final_weights(precise))


@pytest.mark.slow
def test_a_resumed_average_is_that_of_an_uninterrupted_run(main, tmp_path):
    three = (*FAST, *EMA, *PRECISE, "--trainer.max_epochs", 3)
    assert main("fit", *three, "--name", "whole")[0] == 0
    # A run that ends with an epoch has the average as its weights, also when it is resumed.
    for steps in (6, 10):
        assert main("fit", *three, "--trainer.max_steps", steps)[0] == 0
        folder = tmp_path / "runs/lenet/0"
        assert main("fit", "--resume", folder, "--trainer.max_steps", -1)[0] == 0
        whole, resumed = (final_weights(it) for it in (tmp_path / "runs/whole/0", folder))
        assert list(kills.differences(whole, resumed)) == []
        shutil.rmtree(folder)


class Note(pl.Callback):
    """Records the average before each batch."""

    def __init__(self, averaging):
        self.averaging = averaging
        self.found = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        average = copy.deepcopy(self.averaging._average_model.module.state_dict())
        self.found[trainer.global_step] = average


def test_the_average_of_a_16_bit_network_keeps_its_precision(tmp_path):
    def averages(*callbacks):
        ema = EMAWeightAveraging(decay=0.7)
        note = Note(ema)
        settings = {"precision": "bf16-true", "enable_checkpointing": False}
        callbacks = [ema, AverageFromStart(ema), note, *callbacks]
        fit(callbacks, shuffled, tmp_path, trainer_settings=settings)
        return note.found

    without, precise = averages(), averages(PreciseStatistics(3))
    assert list(kills.differences(without, precise)) == []
    mean = precise[20]["network.1.running_mean"]
    assert mean.dtype == torch.float32 and not torch.equal(mean.bfloat16().float(), mean)


@pytest.mark.slow
def test_a_run_of_a_16_bit_network_that_ends_within_an_epoch_saves_the_same_average(tmp_path):
    given = ("--trainer.precision", "bf16-true", *EMA, "--trainer.max_steps", 6)
    assert_same_training(*pair(tmp_path, *given))


def test_with_any_order_of_callbacks_lightnings_average_has_its_statistics(tmp_path):
    for name, order in (("first", 1), ("last", -1)):
        ema, precise = EMAWeightAveraging(decay=0.7), PreciseStatistics(3)
        callbacks = [precise, ema, best(tmp_path / name)][::order]
        module, _ = fit(callbacks, shuffled, tmp_path)
        for state in (weights(tmp_path / name / "best.ckpt"), module.state_dict()):
            reference = Residual()
            reference.load_state_dict(state)
            assert_statistics(state, reference, inputs_of(precise, shuffled))


def test_an_average_that_is_saved_after_fit_has_its_statistics(tmp_path):
    precise, settings = PreciseStatistics(3), {"enable_checkpointing": False}
    callbacks = [EMAWeightAveraging(decay=0.7), precise]
    _, trainer = fit(callbacks, shuffled, tmp_path, trainer_settings=settings)
    trainer.save_checkpoint(tmp_path / "average.ckpt")
    state, reference = saved(tmp_path, "average.ckpt")["state_dict"], Residual()
    reference.load_state_dict(state)
    assert_statistics(state, reference, inputs_of(precise, shuffled))


def test_an_average_that_is_updated_after_its_validation_keeps_its_own_statistics(tmp_path):
    """The estimated ones are those of the average before."""

    def saved_average(name, *callbacks):
        # It is updated at the end of each epoch only, before ModelCheckpoint saves.
        ema = EMAWeightAveraging(decay=0.7, update_every_n_steps=0, update_starting_at_epoch=0)
        newest = ModelCheckpoint(tmp_path / name, "newest", enable_version_counter=False)
        fit([ema, *callbacks, newest], shuffled, tmp_path)
        return saved(tmp_path / name, "newest.ckpt")

    without, precise = saved_average("without"), saved_average("with", PreciseStatistics(3))
    assert precise["averaging_state"]["n_averaged"] == 3
    assert list(kills.differences(without["state_dict"], precise["state_dict"])) == []


# Stochastic weight averaging


@pytest.mark.parametrize("norm", [pytest.param("custom", marks=pytest.mark.slow), "article"])
def test_stochastic_weight_averaging_needs_no_epoch_of_its_own(main, tmp_path, norm):
    given = ("--model.norm", norm, *SWA, *PRECISE, "--data.val_images", 0)
    code, out, err = main("fit", *FAST, *given, "--trainer.max_epochs", 3)
    assert code == 0, err
    assert "epoch  3/3" in out and "epoch  4" not in out
    folder = tmp_path / "runs/lenet/0"
    found, last = result_of(folder), saved(folder)
    assert (found["epochs"], found["steps"], found["tested"]) == (3, 12, "last.ckpt")
    average = last["callbacks"]["StochasticWeightAveraging"]["average_model_state"]
    for name, _ in Classifier(norm).named_parameters():
        assert torch.equal(last["state_dict"][name], average[name]), name
    data = FashionMNIST("sample", batch_size=32, val_images=0)
    data.prepare_data()
    data.setup("fit")
    state = {name.removeprefix("network."): it for name, it in final_weights(folder).items()}
    assert_statistics(state, as_builtin(state), batches_of(data, 3))
    limit = ("--trainer.limit_test_batches", 2)
    _, out, _ = main("test", "--ckpt_path", folder / LAST, *limit)
    assert f"test_acc   {found['test_acc']:.4f}" in out


def test_without_the_flag_a_norm_whose_statistics_cannot_be_recomputed_is_refused(main):
    code, _, err = main("fit", *FAST, "--model.norm", "article", *SWA)
    assert code == 2
    assert "cannot be recomputed for averaged weights" in err


def test_the_callback_makes_its_own_pass_in_a_later_fit_without_the_flag(tmp_path):
    averaging = StochasticWeightAveraging(0.1, swa_epoch_start=1)
    settings = {"enable_checkpointing": False}
    callbacks = [averaging, PreciseStatistics(3)]
    module, trainer = fit(callbacks, shuffled, tmp_path, trainer_settings=settings)
    assert (trainer.current_epoch, trainer.global_step) == (3, 21)
    assert averaging.pl_module_contains_batch_norm(module)


def test_a_checkpoint_at_the_end_does_not_have_the_statistics_of_earlier_weights(tmp_path):
    """At the end of training, ModelCheckpoint saves the averaged weights if it has not saved."""
    averaging = StochasticWeightAveraging(0.1, swa_epoch_start=1)
    never = ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=100)
    precise = PreciseStatistics(3)
    fit([averaging, never, precise], shuffled, tmp_path)
    state = saved(tmp_path, "last.ckpt")["state_dict"]
    assert torch.equal(state["network.0.weight"], averaging._average_model.network[0].weight)
    for name, value in precise.running.items():
        assert torch.equal(state[name], value), name
        assert not torch.equal(precise.estimated[name], value), name
