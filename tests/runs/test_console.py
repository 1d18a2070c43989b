"""The lines that a run prints before and after training."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch

from bn_lightning.runs import console
from tests.projects.friedman.experiment import Regression, Table
from tests.support.runs import result_of


def test_closing_lines_have_the_results_and_the_first_norm_layer(trained):
    folder, stdout = trained
    result = result_of(folder)
    assert stdout.count("epoch  ") == 2
    assert f"train loss {result['train_loss']:.3f}, train acc {result['train_acc']:.3f}" in stdout
    assert f"test acc {result['test_acc']:.3f}" in stdout
    assert f"{result['images_per_second']:,.1f} samples/sec on cpu" in stdout
    state = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    gamma = ", ".join(f"{value:.2f}" for value in state["network.norm1.weight"])
    assert f"gamma of the first norm layer: [{gamma}]" in stdout


def test_first_lines_have_the_network_the_data_and_the_folder(trained):
    first, second, third, fourth, *_ = trained[1].splitlines()
    assert first == ("LeNet, norm custom, 44,878 parameters, on cpu, precision 32-true, seed 0")
    assert second.startswith("Fashion-MNIST from ")
    assert second.endswith(" (sample), validated on held-out training samples")
    assert third == "run folder runs/lenet/0; watch it with: tensorboard --logdir runs"
    assert fourth == "the charts are at http://localhost:6006/#custom_scalars"


class OnTestSet(Table):
    validates_on_test_set = True


def a_trainer(world_size=1):
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    return SimpleNamespace(strategy=strategy, precision="32-true", world_size=world_size)


def test_header_of_another_task(tmp_path):
    lines = console.header(a_trainer(), Regression(width=4), OnTestSet(seed=3), tmp_path)
    assert lines.splitlines() == [
        "Perceptron, 57 parameters, on cpu, precision 32-true, seed 3",
        "Friedman's problem, 1,000 rows, validated on the test set",
        f"run folder {tmp_path}",
    ]


@pytest.mark.parametrize(
    ("world_size", "norm", "is_synchronized", "expected"),
    [
        (1, "custom", False, None),
        (2, "none", False, None),
        (2, "custom", True, "2 processes, norm statistics are synchronized"),
        (2, "custom", False, "2 processes: each normalizes its own shard of a batch"),
        (3, "builtin", False, "--trainer.sync_batchnorm true"),
    ],
)
def test_notes_on_processes(world_size, norm, is_synchronized, expected):
    trainer = a_trainer(world_size)
    notes = console.notes(trainer, Regression(norm=norm), Table(), is_synchronized)
    assert len(notes) == (expected is not None)
    assert expected is None or expected in notes[0]


def test_note_on_validation_metrics_of_the_test_set():
    [note] = console.notes(a_trainer(), Regression(), OnTestSet(), False)
    assert "val_loss and val_rmse and val_r2 are computed on the test set" in note


RESULT = {
    "tested": "best.ckpt",
    "train_loss": 4.0,
    "train_rmse": 2.0,
    "train_r2": 0.81251,
    "test_rmse": None,
    "test_r2": 0.5,
    "val_images_from": "training set",
    "val_rmse_best": 1.0,
    "val_rmse_final": 1.5,
    "val_rmse_mean_of_last_3": 1.25,
    "images_per_second": 12_345.67,
    "device": "cpu",
}


def test_closing_lines_of_another_task(tmp_path):
    closing = console.closing(RESULT, Regression(), tmp_path)
    assert closing.splitlines() == [
        "",
        f"tested best.ckpt of {tmp_path}",
        "train loss 4.000, train rmse 2.000, train r2 0.813, test rmse none, test r2 0.500",
        "12,345.7 samples/sec on cpu",
    ]
    on_test_set = RESULT | {"val_images_from": "test set"}
    assert (
        "test rmse after each epoch: final 1.500, best 1.000, mean of the last three 1.250"
        in console.closing(on_test_set, Regression(), tmp_path)
    )
    untrained = RESULT | {"images_per_second": None, "val_rmse_best": None}
    assert "0.0 samples/sec" in console.closing(untrained, Regression(), tmp_path)


def test_closing_lines_of_a_task_with_only_a_loss(tmp_path):
    class Bare(Regression):
        selects = ("val_loss", "min")

        def __init__(self):
            super().__init__()
            self.metric_names = ("loss",)

        def summary(self):
            return ["and the rest"]

    result = RESULT | {"test_loss": 0.25, "val_loss_best": 1.0}
    lines = console.closing(result, Bare(), tmp_path).splitlines()
    assert lines[2] == "train loss 4.000, test loss 0.250"
    assert lines[-1] == "and the rest"


def test_metrics_of_single_classes_are_not_printed():
    found = [{"test_loss": 0.5, "test_acc": 0.75, "test_acc_of/Bag": 1.0}]
    assert console.metrics(found) == "test_loss  0.5000\ntest_acc   0.7500"


def test_metrics_of_a_real_test_are_printed():
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    found = trainer.test(Regression(), datamodule=Table(rows=40), verbose=False)
    names = [line.split()[0] for line in console.metrics(found).splitlines()]
    assert names == ["test_loss", "test_rmse", "test_r2"]
