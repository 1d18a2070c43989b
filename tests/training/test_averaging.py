"""Averaged weights and their running statistics."""

import copy
import itertools
import json

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.nn import functional as F

from bn_lightning import Classifier, FashionMNIST, StochasticWeightAveraging, UserError
from bn_lightning.training.averaging import AverageFromStart
from bn_lightning.training.batches import Epoch
from tests.conftest import BRIEF, assert_same_weights, run_here, weights
from tests.projects.friedman.experiment import Regression, Table
from tests.support.logs import QUIET, events_in
from tests.support.runs import result_of

OURS = "bn_lightning.StochasticWeightAveraging"
LIGHTNINGS = "lightning.pytorch.callbacks.StochasticWeightAveraging"
CLOSE = {"rtol": 0, "atol": 5e-5}
# config.yaml cannot represent the default device of Lightning's callback.
pytestmark = pytest.mark.filterwarnings("ignore:\\s*Unable to serialize instance cpu")
FEW = (*BRIEF, "--data.batch_size", 64, "--trainer.limit_train_batches", 6, "--model.lr", "0.1")


def averaging(callback, norm="custom"):
    return (
        *FEW,
        "--model.norm",
        norm,
        f"--trainer.callbacks+={callback}",
        "--trainer.callbacks.swa_lrs",
        "0.1",
    )


@pytest.mark.slow
def test_custom_norm_ends_like_builtin_norm_with_lightnings_callback(main, tmp_path):
    flags = ("--trainer.max_epochs", 3, "--data.val_images", 0)
    for callback, norm in ((LIGHTNINGS, "builtin"), (OURS, "builtin"), (OURS, "custom")):
        code, out, err = main(
            "fit", *averaging(callback, norm), *flags, "--name", norm + callback[0]
        )
        assert code == 0, err
        assert "epoch  4/4" in out  # the pass that computes the statistics
    truth, same, ours = (
        weights(tmp_path / f"runs/{name}/0/checkpoints/last.ckpt")
        for name in ("builtinl", "builtinb", "customb")
    )
    assert truth.keys() == ours.keys()
    for name, value in truth.items():
        assert torch.equal(same[name], value), name
        torch.testing.assert_close(ours[name], value, **CLOSE, msg=name)

    # The expected statistics of the first norm are the mean over the batches of that pass.
    data = FashionMNIST("sample", batch_size=64, val_images=0)
    data.prepare_data()
    data.setup("fit")
    batches = data.train_dataloader()
    batches.epoch = lambda: Epoch(data.train_order(3))
    conv = {name: ours[f"network.conv1.{name}"] for name in ("weight", "bias")}
    outputs = [F.conv2d(images, **conv) for images, _ in itertools.islice(batches, 6)]
    mean, var = (
        torch.stack([f(y, (0, 2, 3)) for y in outputs]).mean(0) for f in (torch.mean, torch.var)
    )
    torch.testing.assert_close(ours["network.norm1.running_mean"], mean, **CLOSE)
    torch.testing.assert_close(ours["network.norm1.running_var"], var, **CLOSE)
    assert ours["network.norm1.num_batches_tracked"] == len(outputs) == 6


def test_the_average_is_not_trained_further_and_config_yaml_reproduces_it(main, tmp_path):
    """Without validation, Lightning's callback would train the average for one more step."""
    assert main("fit", *averaging(OURS), "--trainer.limit_val_batches", 0)[0] == 0
    folder = tmp_path / "runs" / "lenet" / "0"
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    average = last["callbacks"]["StochasticWeightAveraging"]["average_model_state"]
    for name, _ in Classifier().named_parameters():
        assert torch.equal(last["state_dict"][name], average[name]), name
    code, _, err = main("fit", "--config", folder / "config.yaml")
    assert code == 0, err
    again = tmp_path / "runs" / "lenet" / "1"
    assert_same_weights(folder / "checkpoints" / "last.ckpt", again / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize(
    "callback, norm, messages",
    [
        (
            LIGHTNINGS,
            "custom",
            ["does not recognize norm layers such as BatchNorm", f"--trainer.callbacks+={OURS}"],
        ),
        (LIGHTNINGS, "renorm", ["norm1, a BatchRenorm", "--model.norm custom"]),
        (OURS, "article", ["norm1, a BatchNorm", "--model.norm custom"]),
    ],
)
def test_norms_whose_statistics_cannot_be_recomputed_are_refused(
    main, tmp_path, callback, norm, messages
):
    code, _, err = main("fit", *averaging(callback, norm))
    assert code == 2
    assert err.startswith("error: ")
    assert "Traceback" not in err
    for message in messages:
        assert message in err
    assert not list(tmp_path.glob("runs/lenet/*"))


def test_a_single_callback_in_a_config_file_is_also_refused(main, tmp_path):
    given = f"{{class_path: {LIGHTNINGS}, init_args: {{swa_lrs: 0.1}}}}"
    (tmp_path / "one.yaml").write_text(f"trainer:\n  callbacks: {given}\n")
    code, _, err = main("fit", *FEW, "--config", "one.yaml")
    assert code == 2
    assert f"--trainer.callbacks+={OURS}" in err


@pytest.mark.parametrize("norm", ["group", "none"])
def test_lightnings_callback_is_accepted_if_the_norm_has_no_statistics(main, norm):
    assert main("fit", *averaging(LIGHTNINGS, norm), "--trainer.fast_dev_run", "true")[0] == 0


@pytest.mark.parametrize("norm", ["custom", "builtin", "ghost"])
def test_statistics_are_reset_and_the_momentum_is_restored_afterwards(norm):
    callback, model = StochasticWeightAveraging(0.1), Classifier(norm)
    model.network(torch.rand(4, 1, 28, 28)).sum().backward()
    buffers = {name: id(buffer) for name, buffer in model.named_buffers()}
    assert callback.pl_module_contains_batch_norm(model)
    callback.reset_batch_norm_and_save_state(model)
    fresh = Classifier(norm).state_dict()
    assert all(torch.equal(buffer, fresh[name]) for name, buffer in model.named_buffers())
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == buffers
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.network.norm1.momentum is None
    callback.reset_momenta()
    assert model.network.norm1.momentum == 0.1


def test_there_is_no_pass_without_running_statistics():
    for model in (
        Classifier("group"),
        Classifier("frozen"),
        *(Classifier(n, {"track_running_stats": False}) for n in ("custom", "builtin")),
    ):
        assert not StochasticWeightAveraging.pl_module_contains_batch_norm(model)


def test_instance_norm_with_statistics_is_refused():
    model = Classifier()
    model.network.norm2 = nn.InstanceNorm2d(16, track_running_stats=True)
    with pytest.raises(UserError, match=r"network\.norm2, a InstanceNorm2d"):
        StochasticWeightAveraging.pl_module_contains_batch_norm(model)


@pytest.mark.parametrize("use_buffers", ["true", "false"])
def test_lightnings_moving_average_is_the_same_for_custom_and_builtin(main, tmp_path, use_buffers):
    flags = (
        "--trainer.callbacks+=lightning.pytorch.callbacks.EMAWeightAveraging",
        *("--trainer.callbacks.decay", "0.9", "--trainer.callbacks.use_buffers", use_buffers),
    )
    for norm in ("custom", "builtin"):
        code, _, err = main("fit", *FEW, *flags, "--model.norm", norm, "--name", norm)
        assert code == 0, err
    # At its end, fit tests the averaged weights, which are in the checkpoint.
    result = json.loads((tmp_path / "runs/custom/0/result.json").read_text())
    best = tmp_path / "runs/custom/0/checkpoints/best.ckpt"
    _, out, _ = main("test", "--ckpt_path", best, "--trainer.limit_test_batches", 2)
    assert f"test_acc   {result['test_acc']:.4f}" in out
    custom, builtin = (
        weights(tmp_path / f"runs/{norm}/0/checkpoints/last.ckpt") for norm in ("custom", "builtin")
    )
    assert custom.keys() == builtin.keys()
    for name, value in builtin.items():
        torch.testing.assert_close(custom[name], value, **CLOSE, msg=name)


def fit_with_average(folder, *flags):
    """Run fit with and without Lightning's moving average. Return the folders of the runs."""
    ema = "--trainer.callbacks+=lightning.pytorch.callbacks.EMAWeightAveraging"
    few = ("--data.rows", 100, "--data.batch_size", 20, "--trainer.max_epochs", 2)
    for name, given in (("plain", ()), ("average", (ema, *flags))):
        run_here("fit", *few, *given, "--name", name, cwd=folder, module="friedman")
    return folder / "runs/plain/0", folder / "runs/average/0"


def test_before_its_first_update_the_average_is_the_network(tmp_path):
    late = ("--trainer.callbacks.update_starting_at_step", 1_000)
    plain, average = fit_with_average(tmp_path, *late)
    for name in ("best.ckpt", "last.ckpt"):
        assert_same_weights(plain / "checkpoints" / name, average / "checkpoints" / name)
    results = [result_of(run) for run in (plain, average)]
    for name in ("val_rmse", "val_rmse_final", "test_rmse"):
        assert results[0][name] == results[1][name], name


def test_an_average_that_starts_late_validates_the_network_first(tmp_path):
    late = ("--trainer.callbacks.update_starting_at_step", 7, "--trainer.callbacks.decay", "0.5")
    plain, average = fit_with_average(tmp_path, *late)
    first, last = (
        [
            [event.value for event in events_in(run).Scalars("val_rmse")][n]
            for run in (plain, average)
        ]
        for n in (0, 1)
    )
    assert first[0] == first[1]
    assert last[0] != last[1]
    saved = torch.load(average / "checkpoints/last.ckpt", weights_only=True)
    assert saved["averaging_state"]["n_averaged"] == 3  # after the steps 8, 9 and 10


def test_validation_does_not_round_the_average_of_a_16_bit_network(tmp_path):
    ema = EMAWeightAveraging(decay=0.9)
    trainer = pl.Trainer(
        **QUIET, logger=False, max_epochs=1, precision="bf16-true",
        callbacks=[ema, AverageFromStart(ema)],
    )  # fmt: skip
    before = {}

    class Note(pl.Callback):
        def on_validation_start(self, trainer, pl_module):
            before.update(copy.deepcopy(ema._average_model.state_dict()))

        def on_validation_end(self, trainer, pl_module):
            for name, value in ema._average_model.state_dict().items():
                assert torch.equal(value, before[name]), name

    trainer.callbacks.append(Note())
    trainer.fit(Regression(), datamodule=Table(rows=100, batch_size=20))
    weight = before["module.network.0.weight"]
    assert weight.dtype == torch.float32
    assert not torch.equal(weight.bfloat16().float(), weight)
