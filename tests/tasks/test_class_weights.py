"""Weights of the classes in the training loss."""

import sys

import lightning.pytorch as pl
import pytest
import torch
from torch.nn import functional as F

from bn_lightning import Classifier, ImageData, UserError
from bn_lightning.tasks.classifier import balanced_weights
from tests.conftest import assert_same_weights, command, run_here, weights
from tests.projects.friedman.experiment import Table
from tests.support.runs import result_of

# Class c has 80, 30, 9 and no training images. The images of a class have the same columns.
RARE = """
import numpy as np


def load(counts=(80, 30, 9, 0)):
    random = np.random.default_rng(0)

    def part(counts):
        labels = np.repeat(np.arange(len(counts)), counts)
        images = random.integers(0, 200, (len(labels), 8, 8), np.uint8)
        images[np.arange(len(labels)), :, labels] += 50
        return images, labels

    return *part(counts), *part((5, 5, 5, 5)), ["a", "b", "c", "d"]
"""
SETTINGS = (
    *("--data.dataset", "rare.load", "--data.batch_size", 16, "--data.val_images", 12),
    *("--model.network", "mlp", "--model.lr", 0.1, "--model.label_smoothing", 0.1),
)
WEIGHTED = (*SETTINGS, "--model.class_weights", "balanced")
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


@pytest.fixture
def rare(tmp_path, monkeypatch):
    """Write the module `rare` into the current folder."""
    (tmp_path / "rare.py").write_text(RARE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("rare", None)


def test_weights_are_inverse_frequencies():
    # scikit-learn 1.9: compute_class_weight("balanced", classes=[0, 1, 2],
    # y=[0] * 80 + [1] * 30 + [2] * 9)
    expected = [0.49583333, 1.32222222, 4.40740741, 0.0]
    counts = torch.tensor([80, 30, 9, 0])
    found = balanced_weights(counts)
    assert found.tolist() == pytest.approx(expected, rel=1e-8)
    assert (found * counts).tolist() == pytest.approx([119 / 3] * 3 + [0])
    assert (found * counts).sum() == pytest.approx(119)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_that_of_pytorch_divided_by_the_samples(rare, smoothing):
    pl.seed_everything(0)
    data = ImageData("rare.load", val_images=0, batch_size=200)
    model = Classifier(
        network="mlp",
        image_size=(8, 8),
        num_classes=4,
        class_weights="balanced",
        label_smoothing=smoothing,
    )
    keys = Classifier(network="mlp", image_size=(8, 8), num_classes=4).state_dict().keys()
    pl.Trainer(max_epochs=3, precision="64-true", **QUIET).fit(model, datamodule=data)
    model.double()
    assert model.state_dict().keys() == keys
    images, labels = data.images.train_images[::3].double() / 255, data.images.train_labels[::3]
    step = model.step((images, labels), "train")
    given = torch.tensor([119 / 240, 119 / 90, 119 / 27, 0.0], dtype=torch.float64)
    # PyTorch divides by the sum of the weights.
    logits = model(images)
    expected = F.cross_entropy(logits, labels, weight=given, label_smoothing=smoothing)
    expected = expected * given[labels].sum() / len(labels)
    assert step.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    [found] = torch.autograd.grad(step.loss, step.outputs)
    [gradient] = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(found, gradient)
    # Evaluation has no weights.
    plain = F.cross_entropy(model(images), labels).item()
    assert model.step((images, labels), "val").loss.item() == pytest.approx(plain, rel=1e-12)
    assert abs(plain - expected.item()) > 0.01


def test_only_training_samples_are_counted(rare):
    data = ImageData("rare.load", val_images=50)
    data.prepare_data()
    data.setup("fit")
    labels = torch.cat([labels for _, labels in data.train_dataloader()])
    assert len(labels) == 69
    expected = [int((labels == c).sum()) for c in range(4)]
    assert data.class_counts().tolist() == expected and expected[3] == 0


def test_a_resumed_run_has_the_same_weights(rare):
    run_here("fit", *WEIGHTED, "--name", "a", "--trainer.max_steps", 9, cwd=rare)
    run_here("fit", *WEIGHTED, "--name", "b", "--trainer.max_steps", 5, cwd=rare)
    run_here("fit", *SETTINGS, "--name", "c", "--trainer.max_steps", 9, cwd=rare)
    trusted = ("--data.dataset", "rare.load")
    resumed = ("--resume", "runs/b/0", "--trainer.max_steps", 9)
    run_here("fit", *resumed, *trusted, cwd=rare)
    last = {name: rare / f"runs/{name}/0/checkpoints/last.ckpt" for name in "abc"}
    assert_same_weights(last["a"], last["b"])
    content = torch.load(last["b"], weights_only=True)
    assert content["hyper_parameters"]["class_weights"] == "balanced"
    assert weights(last["b"]).keys() == weights(last["c"]).keys()
    losses = [result_of(rare / f"runs/{name}/0")["train_loss"] for name in "abc"]
    assert losses[0] == losses[1] != losses[2]
    # Without training samples there are no weights.
    best = last["b"].with_name("best.ckpt")
    tested = run_here("test", "--ckpt_path", best, *trusted, cwd=rare)
    assert f"{result_of(rare / 'runs/b/0')['test_acc']:.4f}" in tested.stdout


@pytest.mark.slow
def test_two_processes_train_as_one(rare):
    exact = ("--trainer.precision", "64-true", "--trainer.sync_batchnorm", "true")
    for name, count in (("one", 1), ("two", 2)):
        settings = ("--name", name, "--trainer.devices", count, "--trainer.max_epochs", 3)
        # The last batch of an epoch has 11 images.
        command("fit", *WEIGHTED, *exact, *settings, cwd=rare)
    one, two = (weights(rare / f"runs/{name}/0/checkpoints/last.ckpt") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-9)
    results = [result_of(rare / f"runs/{name}/0") for name in ("one", "two")]
    assert results[0]["train_loss"] == pytest.approx(results[1]["train_loss"], rel=1e-6)


def test_data_without_class_counts_are_refused_before_the_first_step():
    class Images(Table):
        """A data module that does not count its classes."""

        def train_dataloader(self):
            raise AssertionError("not reached")

    model = Classifier(class_weights="balanced")
    with pytest.raises(UserError, match=r"but Images has no class_counts\(\).*\n.*weights null"):
        pl.Trainer(max_epochs=1, **QUIET).fit(model, datamodule=Images())


def test_another_value_is_refused(tmp_path):
    done = run_here("fit", "--model.class_weights", "equal", cwd=tmp_path, check=False)
    assert done.returncode == 2 and list(tmp_path.iterdir()) == []
    assert "class_weights" in done.stderr and "balanced" in done.stderr
    assert len(done.stderr.splitlines()) < 10
    with pytest.raises(UserError, match="class_weights is 'equal'; it must be 'balanced' or null"):
        Classifier(class_weights="equal")
