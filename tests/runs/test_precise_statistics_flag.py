"""The flag `fit --precise_statistics N`: what a run validates, saves and tests."""

import csv
import io
import shutil

import pytest
import torch

from bn_lightning import Classifier, FashionMNIST
from bn_lightning.deploy import served
from tests.conftest import BRIEF, QUICK, run_here, weights
from tests.support import kills
from tests.support.logs import events_in
from tests.support.precise import as_builtin, assert_statistics, batches_of
from tests.support.runs import result_of

FAST = (*BRIEF, "--monitor", "false")
PRECISE = ("--precise_statistics", 3)
LAST, BEST = "checkpoints/last.ckpt", "checkpoints/best.ckpt"
NORMS = (
    *("custom", "renorm"),
    *(pytest.param(norm, marks=pytest.mark.slow) for norm in ("article", "builtin", "ghost")),
)
EVERYTHING = (
    *("--model.norm", "noisy.Noisy", "--model.optimizer_args.momentum", "0.9"),
    *("--data.flip", "true", "--data.shift", "2", "--trainer.accumulate_grad_batches", 2),
    *("--trainer.val_check_interval", "0.5", "--trainer.log_every_n_steps", 1),
)
# What training needs and leaves. The results of validations are elsewhere.
OF_TRAINING = (
    *("state_dict", "optimizer_states", "lr_schedulers", "train_metrics"),
    *("global_step", "epoch", "loops", "current_model_state", "averaging_state"),
)


def saved(folder, name=LAST):
    return torch.load(folder / name, weights_only=True)


def pair(cwd, *settings):
    """Run fit without and with the flag, and return the folders."""
    kills.prepare(cwd)
    for name, flag in (("without", ()), ("with", PRECISE)):
        run_here("fit", *FAST, *settings, *flag, "--name", name, cwd=cwd)
    return cwd / "runs/without/0", cwd / "runs/with/0"


def assert_same_training(one, other):
    first, second = (
        {name: it for name, it in saved(folder).items() if name in OF_TRAINING}
        for folder in (one, other)
    )
    assert list(kills.differences(first, second)) == []
    assert first["optimizer_states"]
    assert result_of(one)["train_loss"] == result_of(other)["train_loss"]
    train = [tag for tag in events_in(one).Tags()["scalars"] if tag.startswith("train_loss")]
    curves = [kills.curves(folder) for folder in (one, other)]
    assert train and all(curves[0][tag] == curves[1][tag] for tag in train)


# The same training


@pytest.fixture(scope="module", params=NORMS)
def runs(request, tmp_path_factory):
    """The norm, and the folders of runs without and with the flag. No test may change them."""
    settings = ("--model.norm", request.param, "--model.lr", "0.2", "--data.flip", "true")
    return request.param, *pair(tmp_path_factory.mktemp("runs"), *settings)


def test_training_is_the_same_bit_for_bit(runs):
    _, without, precise = runs
    assert_same_training(without, precise)
    assert "precise_statistics" not in saved(without)
    # Validation is not: the running statistics lag.
    assert result_of(without)["val_loss"] != result_of(precise)["val_loss"]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(EVERYTHING, id="everything"),
        pytest.param(EVERYTHING[2:4], id="momentum", marks=pytest.mark.slow),
        pytest.param(EVERYTHING[:2], id="dropout", marks=pytest.mark.slow),
        pytest.param((*EVERYTHING[:2], *EVERYTHING[-4:-2]), id="interval", marks=pytest.mark.slow),
        pytest.param(
            (*EVERYTHING, "--trainer.precision", "bf16-mixed"),
            id="bf16-mixed",
            marks=pytest.mark.slow,
        ),
        pytest.param(("--trainer.precision", "bf16-true"), id="bf16", marks=pytest.mark.slow),
        pytest.param(("--trainer.precision", "64-true"), id="float64", marks=pytest.mark.slow),
        pytest.param(("--trainer.max_steps", 6), id="max_steps", marks=pytest.mark.slow),
        pytest.param(
            ("--trainer.limit_val_batches", 0), id="no validation", marks=pytest.mark.slow
        ),
        pytest.param(
            ("--model.network", "resnet", "--model.network_args.depth", 8),
            id="resnet",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_training_with_other_settings_is_the_same_bit_for_bit(tmp_path, settings):
    assert_same_training(*pair(tmp_path, *settings))


# The estimated statistics


def data_of(**settings):
    data = FashionMNIST("sample", batch_size=32, **settings)
    data.prepare_data()
    data.setup("fit")
    return data


def of_network(state):
    return {name.removeprefix("network."): it for name, it in state.items()}


def test_checkpoints_have_the_statistics_of_the_promised_batches(runs):
    norm, _, precise = runs
    # The training images are flipped, and those of the estimate are not.
    batches = batches_of(data_of(flip=True), 3)
    last = saved(precise)
    for saved_weights in (
        weights(precise / BEST),
        last["state_dict"] | last["precise_statistics"],
    ):
        state = of_network(saved_weights)
        if norm == "ghost":  # it normalizes by parts of the batch
            reference = Classifier(norm).network
            reference.load_state_dict(state)
        else:
            reference = as_builtin(state)
        assert_statistics(state, reference, batches)
    for name, value in last["precise_statistics"].items():
        assert not torch.allclose(last["state_dict"][name], value, rtol=0.01), name
    assert len(last["precise_statistics"]) == 8


def test_validate_repeats_the_validation_of_the_run(runs):
    _, _, precise = runs
    found = result_of(precise)
    limit = ("--trainer.limit_val_batches", 2)
    done = run_here("validate", "--ckpt_path", precise / BEST, *limit, cwd=precise)
    # The best validation need not be the last one.
    losses = [value for _, value in kills.curves(precise)["val_loss"]]
    accuracies = [value for _, value in kills.curves(precise)["val_acc"]]
    best = accuracies.index(max(accuracies))
    assert found["val_acc_best"] == pytest.approx(max(accuracies))
    assert f"val_acc    {accuracies[best]:.4f}" in done.stdout
    assert f"val_loss   {losses[best]:.4f}" in done.stdout


def test_last_ckpt_is_evaluated_with_the_estimated_statistics(main, tmp_path):
    few = ("--data.val_images", 0, "--model.lr", "0.3", "--seed_everything", 3)
    code, out, err = main("fit", *FAST, *few, *PRECISE)
    assert code == 0, err
    folder = tmp_path / "runs/lenet/0"
    found = result_of(folder)
    assert found["tested"] == "last.ckpt"
    limit = ("--trainer.limit_test_batches", 2)
    _, out, _ = main("test", "--ckpt_path", folder / LAST, *limit)
    assert f"test_acc   {found['test_acc']:.4f}" in out
    assert f"test_loss  {found['test_loss']:.4f}" in out
    # Without the estimated statistics, the results are others.
    last = saved(folder)
    estimated = last.pop("precise_statistics")
    torch.save(last, "running.ckpt")
    _, out, _ = main("test", "--ckpt_path", "running.ckpt", *limit)
    assert "test_loss  " in out and f"test_loss  {found['test_loss']:.4f}" not in out

    network = Classifier().network
    network.load_state_dict(of_network(last["state_dict"] | estimated))
    data = data_of(val_images=0)
    data.setup("test")
    images = data.test_samples()[0]
    with torch.no_grad():
        logits = network.eval()(data.preprocessing(images))

    limit = ("--trainer.limit_predict_batches", 1)
    code, out, err = main("predict", "--ckpt_path", folder / LAST, "--format", "csv", *limit)
    assert code == 0, err
    rows = csv.DictReader(io.StringIO(out))
    found = torch.tensor([float(row["probability"]) for row in rows])
    expected = logits[: len(found)].softmax(1).amax(1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)

    restored = served.restore(str(folder / LAST), "bn_lightning.experiment:EXPERIMENT")
    torch.testing.assert_close(restored.serve()(images), logits, rtol=1e-4, atol=1e-4)


def test_more_batches_than_an_epoch_are_all_samples(main, tmp_path):
    settings = ("--data.val_images", 52_000, "--trainer.max_epochs", 1)
    assert main("fit", *FAST, *settings, "--precise_statistics", 1_000)[0] == 0
    data = data_of(val_images=52_000)
    batches = batches_of(data, 1_000)
    assert sum(map(len, batches)) == len(data.train_indices) < 1_000
    state = of_network(weights(tmp_path / "runs/lenet/0" / BEST))
    assert_statistics(state, as_builtin(state), batches)


@pytest.mark.slow
def test_an_exported_file_has_the_estimated_statistics(main, tmp_path):
    assert main("fit", *FAST, "--data.val_images", 0, *PRECISE)[0] == 0
    folder = tmp_path / "runs/lenet/0"
    code, _, err = main("export", folder / LAST, "network.pt2")
    assert code == 0, err
    last, network = saved(folder), Classifier().network.eval()
    network.load_state_dict(of_network(last["state_dict"] | last["precise_statistics"]))
    data = data_of(val_images=0)
    data.setup("test")
    images = data.test_samples()[0]
    exported = torch.export.load("network.pt2").module()
    expected = network(data.preprocessing(images))
    torch.testing.assert_close(exported(images), expected, rtol=1e-4, atol=1e-4)


# Networks, settings and messages


@pytest.mark.parametrize("norm", ["none", pytest.param("layer", marks=pytest.mark.slow)])
def test_a_network_without_running_statistics_is_trained_as_usual(main, tmp_path, norm):
    code, out, err = main("fit", *FAST, "--model.norm", norm, *PRECISE)
    assert code == 0, err
    assert "no layer with running statistics: nothing is estimated" in out
    assert "precise statistics: estimated" not in out
    assert not saved(tmp_path / "runs/lenet/0").get("precise_statistics")


def test_the_console_says_what_is_estimated_and_how_often(main, trained):
    _, out, _ = main("fit", *FAST, *PRECISE)
    assert "from 3 training batches: running statistics of 4 layer(s) are estimated" in out
    assert "precise statistics: estimated 3 time(s), in " in out
    assert "precise statistics" not in trained[1]


@pytest.mark.parametrize("number", ["-1", "2.5"])
def test_an_invalid_number_is_refused(main, tmp_path, number):
    code, _, err = main("fit", *FAST, "--precise_statistics", number)
    assert code == 2
    assert "precise_statistics" in err and number in err
    assert "Traceback" not in err and len(err.splitlines()) < 25
    assert not list(tmp_path.glob("runs/*"))


def test_a_dry_run_estimates_too(main):
    code, out, err = main("fit", *FAST, *PRECISE, "--trainer.fast_dev_run", "true")
    assert code == 0, err
    assert "precise statistics: estimated 2 time(s)" in out


@pytest.mark.slow
def test_weights_in_memory_are_tested_with_the_estimated_statistics(main, tmp_path):
    """A run without checkpoints has the result of a run that tests its last.ckpt."""
    few = ("--data.val_images", 0, *PRECISE)
    assert main("fit", *FAST, *few)[0] == 0
    first = result_of(tmp_path / "runs/lenet/0")
    assert main("fit", *FAST, *few, "--trainer.enable_checkpointing", "false")[0] == 0
    second = result_of(tmp_path / "runs/lenet/1")
    assert (first["tested"], second["tested"]) == ("last.ckpt", "the weights in memory")
    assert first["test_loss"] == second["test_loss"]
    assert first["test_acc"] == second["test_acc"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_has_the_same_statistics(main, tmp_path):
    assert main("fit", *FAST, *PRECISE, "--model.compile", "true")[0] == 0
    state = of_network(weights(tmp_path / "runs/lenet/0" / BEST))
    assert_statistics(state, as_builtin(state), batches_of(data_of(), 3))


@pytest.mark.slow
def test_a_run_that_reached_its_time_limit_is_tested_with_the_estimated_statistics(main, tmp_path):
    given = ("--data.val_images", 0, "--data.batch_size", 32, "--monitor", "false")
    limit = ("--trainer.max_time", str({"milliseconds": 300}))
    code, out, err = main("fit", *QUICK, *given, *limit, *PRECISE, "--trainer.max_epochs", 50)
    assert code == 0, err
    assert "Stopped by --trainer.max_time" in out
    folder = tmp_path / "runs/lenet/0"
    assert result_of(folder)["tested"] == "last.ckpt"
    assert len(saved(folder)["precise_statistics"]) == 8
    _, out, _ = main("test", "--ckpt_path", folder / LAST)
    assert f"test_loss  {result_of(folder)['test_loss']:.4f}" in out
