"""Image classification: loss, metrics, and the reports of a run."""

import lightning.pytorch as pl
import pytest
import torch
from torch.nn import functional as F

from bn_lightning import Classifier, FashionMNIST, UserError
from bn_lightning.data.fashion_mnist import CLASSES
from bn_lightning.tasks.classifier import class_table
from tests.conftest import BRIEF
from tests.projects.friedman.experiment import Table
from tests.support.runs import result_of

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


def fit(model, seed=0, **settings):
    pl.seed_everything(seed)
    data = FashionMNIST("sample", seed=seed)
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 1, "limit_train_batches": 8, **settings})
    trainer.fit(model, datamodule=data)
    return trainer


def test_a_momentum_above_one_half_is_noted_by_fit(main):
    _, out, _ = main("fit", *BRIEF, "--trainer.max_steps", 1, "--model.norm_args.momentum", 0.9)
    assert "The article's momentum 0.9 is --model.norm_args.momentum 0.1\n" in out


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_custom_and_builtin_have_the_same_first_loss(seed):
    losses = []
    for norm in ("custom", "builtin"):
        torch.manual_seed(seed)
        model = Classifier(norm)
        images = torch.rand(256, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
        losses.append(F.cross_entropy(model(images), torch.arange(256) % 10).item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_metrics_are_means_over_all_images():
    """The last batch is smaller, so a mean over batches would differ."""
    pl.seed_everything(0)
    model, data = Classifier(), FashionMNIST("sample", batch_size=300)
    trainer = pl.Trainer(**QUIET)
    [metrics] = trainer.test(model, datamodule=data, verbose=False)
    images, labels = data.test_dataloader().take(torch.arange(1_000))
    with torch.no_grad():
        logits = model.eval()(images)
    assert metrics["test_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    right = logits.argmax(1) == labels
    assert metrics["test_acc"] == pytest.approx(right.float().mean().item())
    for c, name in enumerate(data.classes):
        of_class = right[labels == c].float().mean().item()
        assert metrics[f"test_acc_of/{name}"] == pytest.approx(of_class)
    counts = torch.zeros(10, 10, dtype=torch.long)
    for truth, prediction in zip(labels, logits.argmax(1), strict=True):
        counts[truth, prediction] += 1
    assert torch.equal(model.confusion, counts)
    assert model.test_report() == class_table(counts, CLASSES)
    trainer.test(model, datamodule=data, verbose=False)
    assert torch.equal(model.confusion, counts)  # of the last test only


def test_labels_are_smoothed_in_training_only():
    """Szegedy et al. 2016, section 7: loss = (1 - e) * loss of the true class + e * mean loss."""
    model, data = Classifier(label_smoothing=0.2), FashionMNIST("sample")
    # The network is trained, since an untrained one has almost equal logits, so that both losses
    # would be equal.
    fit(model, limit_train_batches=1.0)
    trainer = pl.Trainer(**QUIET)
    [metrics] = trainer.test(model, datamodule=data, verbose=False)
    batch = data.test_dataloader().take(torch.arange(1_000))
    losses = -model.eval()(batch[0]).log_softmax(1)
    right = losses[torch.arange(1_000), batch[1]]
    assert metrics["test_loss"] == pytest.approx(right.mean().item(), rel=1e-5)
    smoothed = model.step(batch, "train").loss
    expected = (0.8 * right + 0.2 * losses.mean(1)).mean().item()
    assert smoothed.item() == pytest.approx(expected, rel=1e-5)
    assert abs(expected - right.mean().item()) > 1e-2
    assert model.step(batch, "val").loss.item() == pytest.approx(right.mean().item(), rel=1e-5)


def test_a_step_returns_loss_logits_labels_and_number_of_samples():
    model = Classifier().to(torch.bfloat16)
    images, labels = torch.rand(6, 1, 28, 28, dtype=torch.bfloat16), torch.arange(6)
    step = model.step((images, labels), "val")
    assert step.outputs.shape == (6, 10) and step.targets is labels and step.num_samples == 6
    assert step.outputs.dtype == torch.bfloat16
    # The network computes in 16 bits, the loss does not.
    assert step.loss.dtype == torch.float32
    double = Classifier().double().step((images.double(), labels), "val")
    assert double.loss.dtype == torch.float64


def test_the_defaults_are_those_of_the_article():
    model = Classifier()
    optimizer = model.configure_optimizers()
    assert type(optimizer) is torch.optim.SGD
    defaults = optimizer.defaults
    assert (defaults["lr"], defaults["momentum"], defaults["weight_decay"]) == (1.0, 0, 0)
    assert model.selects == ("val_acc", "max")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "batch"}, "Use one of custom"),
        ({"norm_args": {"epsilon": 1}}, "epsilon"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0; it must be at least 0 and less than 1"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Classifier(**settings)


def test_a_checkpoint_is_plain_data_and_restores_the_model(tmp_path):
    arguments = {"momentum": 0.9}
    model = Classifier("builtin", {"eps": 1e-3}, "relu", "max", 0.1, optimizer_args=arguments)
    trainer = fit(model)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    restored = Classifier.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert restored.hparams == model.hparams == content["hyper_parameters"]
    own = {"norm", "norm_args", "activation", "pooling", "lr", "label_smoothing", "class_weights"}
    own |= {"network", "network_args", "in_channels", "image_size", "num_classes"}
    of_the_base = {"optimizer", "optimizer_args", "scheduler", "scheduler_args", "init_from"}
    of_the_base |= {"decay_norms_and_biases", "warmup_steps", "compile", "memory_format"}
    assert model.hparams.keys() == own | of_the_base
    assert restored.network.norm1.eps == 1e-3
    images = torch.rand(4, 1, 28, 28)
    assert torch.equal(restored.eval()(images), model.eval()(images))


@pytest.mark.parametrize("norm", ["custom", pytest.param("article", marks=pytest.mark.slow)])
def test_a_restored_checkpoint_has_the_same_accuracy(tmp_path, norm):
    """This requires that the running statistics are saved."""
    model = Classifier(norm)
    trainer = fit(model, max_epochs=2, limit_train_batches=1.0)
    [before] = trainer.validate(model, datamodule=trainer.datamodule, verbose=False)
    assert before["val_acc"] > 0.5
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    restored = Classifier.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    again = pl.Trainer(**QUIET)
    [after] = again.validate(restored, datamodule=FashionMNIST("sample"), verbose=False)
    assert after == before


def test_predictions_are_probabilities():
    model = Classifier()
    [*batches] = pl.Trainer(**QUIET).predict(model, datamodule=FashionMNIST("sample"))
    probabilities = torch.cat(batches)
    assert probabilities.shape == (1_000, 10)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(1_000))


def test_the_norm_can_be_a_function_in_a_users_module(main, tmp_path):
    (tmp_path / "own_norms.py").write_text(
        "from torch import nn\n\n\ndef group_norm(num_features, num_dims, num_groups=2):\n"
        "    return nn.GroupNorm(num_groups, num_features)\n"
    )
    chosen = ("--model.norm", "own_norms.group_norm", "--model.norm_args.num_groups", "1")
    assert main("fit", *BRIEF, *chosen, "--trainer.max_epochs", 1)[0] == 0
    assert result_of(tmp_path / "runs" / "lenet" / "0")["norm"] == "own_norms.group_norm"


# Reports of a run


def test_describe_and_facts_name_the_norm():
    model = Classifier("group", {"num_groups": 2})
    assert model.describe() == "LeNet, norm group"
    assert model.facts() == {"network": "lenet", "norm": "group"}


def test_the_summary_contains_gamma_and_beta_of_the_first_norm():
    assert Classifier("none").summary() == []
    article = "\n".join(Classifier("article").summary())
    assert "gamma of the first norm layer: [1.00, 1.00, 1.00, 1.00, 1.00, 1.00]" in article
    assert "beta of the first norm layer: [0.00, 0.00, 0.00, 0.00, 0.00, 0.00]" in article
    assert [line.split()[0] for line in Classifier("custom").summary()] == ["gamma", "beta"]


def test_the_class_table_names_the_most_frequent_misclassification():
    counts = torch.tensor([[90, 4, 6], [0, 100, 0], [0, 0, 0]])
    table = class_table(counts, ["coat", "dress", "bag"])
    _, *rows = (line.split() for line in table.splitlines())
    assert rows == [["coat", "0.900", "bag", "(6.0%)"], ["dress", "1.000"], ["bag", "none"]]


def test_classes_without_names_are_numbered():
    class Images(Table):
        """A data module that names no classes."""

        def test_dataloader(self):
            images = torch.rand(20, 1, 28, 28)
            return self.batches(images, torch.arange(20) % 10)

    model, trainer = Classifier(), pl.Trainer(**QUIET)
    [metrics] = trainer.test(model, datamodule=Images(), verbose=False)
    assert {f"test_acc_of/{label}" for label in range(10)} <= metrics.keys()
    names = [line.split()[0] for line in model.test_report().splitlines()[1:]]
    assert names == [str(label) for label in range(10)]


def test_the_table_of_many_classes_has_the_worst_only():
    counts = torch.full((100, 100), 1) + torch.diag(torch.arange(100).flip(0) * 10)
    note, header, *rows = class_table(counts, [f"name {c}" for c in range(100)]).splitlines()
    assert note == "The 20 of 100 classes with the lowest test accuracy:"
    assert header.split() == ["class", "test", "acc", "most", "often", "misclassified", "as"]
    # The accuracy of class c is (991 - 10 c) / (1090 - 10 c).
    expected = [
        ["name", f"{c}", f"{(991 - 10 * c) / (1090 - 10 * c):.3f}"] for c in range(99, 79, -1)
    ]
    assert [row.split()[:3] for row in rows] == expected


@pytest.mark.parametrize("name", ["a long name of a class, " * 5, "猫" * 12, "Straße"])
def test_names_of_any_length_fit_into_a_narrow_terminal(monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    counts = torch.tensor([[0, 9], [9, 0]])
    _, first, second = class_table(counts, [name, "cat"]).splitlines()
    assert max(map(len, (first, second))) <= 80
    assert first.startswith(name[:8]) and first.endswith("cat (100.0%)")
    assert second.startswith("cat") and name[:8] in second.removeprefix("cat")


def test_a_class_without_test_samples_has_no_accuracy():
    class Images(Table):
        """A data module without test samples of class 7."""

        def test_dataloader(self):
            labels = torch.arange(20) % 10
            return self.batches(torch.rand(20, 1, 28, 28), labels.where(labels != 7, 8))

    model = Classifier()
    [metrics] = pl.Trainer(**QUIET).test(model, datamodule=Images(), verbose=False)
    expected = {f"test_acc_of/{label}" for label in range(10) if label != 7}
    assert {name for name in metrics if "/" in name} == expected
    assert model.test_report().splitlines()[8].split() == ["7", "none"]
