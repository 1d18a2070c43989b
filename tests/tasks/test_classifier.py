import lightning.pytorch as pl
import pytest
import torch
from torch.nn import functional as F

from bn_lightning import Classifier, FashionMNIST, UserError

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
    """Batches of 256 and a smaller last one: loss and accuracy are the mean over images, not over batches."""
    pl.seed_everything(0)
    model, data = Classifier(), FashionMNIST("sample", batch_size=300)
    trainer = pl.Trainer(**QUIET)
    [figures] = trainer.test(model, datamodule=data, verbose=False)
    images, labels = data.test_dataloader().take(torch.arange(1_000))
    with torch.no_grad():
        logits = model.eval()(images)
    assert figures["test_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    right = logits.argmax(1) == labels
    assert figures["test_acc"] == pytest.approx(right.float().mean().item())
    for c, name in enumerate(data.classes):
        assert figures[f"test_acc_of/{name}"] == pytest.approx(right[labels == c].float().mean().item())


def test_labels_are_smoothed_in_training_alone():
    """The loss by Szegedy et al. 2016, equation 10: (1 - e) times the right class's, and e times the mean of all."""
    pl.seed_everything(0)
    model, data = Classifier(label_smoothing=0.2), FashionMNIST("sample")
    trainer = pl.Trainer(**QUIET)
    [figures] = trainer.test(model, datamodule=data, verbose=False)
    batch = data.test_dataloader().take(torch.arange(1_000))
    losses = -model.eval()(batch[0]).log_softmax(1)
    right = losses[torch.arange(1_000), batch[1]]
    assert figures["test_loss"] == pytest.approx(right.mean().item(), rel=1e-5)
    smoothed, _ = model._step(batch, "train")
    assert smoothed.item() == pytest.approx((0.8 * right + 0.2 * losses.mean(1)).mean().item(), rel=1e-5)


def test_defaults_are_the_articles():
    model = Classifier()
    optimizer = model.configure_optimizers()
    assert type(optimizer) is torch.optim.SGD
    assert (optimizer.defaults["lr"], optimizer.defaults["momentum"], optimizer.defaults["weight_decay"]) == (1.0, 0, 0)


def test_one_cycle_spans_the_run():
    model = Classifier(lr=0.5, scheduler="OneCycleLR", scheduler_args={"pct_start": 0.25})
    trainer = fit(model, max_epochs=2)
    [config] = trainer.lr_scheduler_configs
    assert config.interval == "step"
    assert config.scheduler.total_steps == 16
    assert config.scheduler.last_epoch == 16
    assert trainer.optimizers[0].param_groups[0]["max_lr"] == 0.5


def test_cosine_annealing_reaches_zero():
    trainer = fit(Classifier(scheduler="CosineAnnealingLR"))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_other_schedulers_move_once_an_epoch():
    trainer = fit(Classifier(scheduler="StepLR", scheduler_args={"step_size": 1, "gamma": 0.5}), max_epochs=3)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.125


def test_plateau_watches_the_validation_loss():
    model = Classifier(scheduler="ReduceLROnPlateau", scheduler_args={"patience": 0})
    assert fit(model).lr_scheduler_configs[0].monitor == "val_loss"


def test_any_optimizer_by_name_or_import_path():
    for name in ("AdamW", "torch.optim.AdamW"):
        model = Classifier(optimizer=name, lr=0.01, optimizer_args={"weight_decay": 0.1})
        optimizer = model.configure_optimizers()
        assert type(optimizer) is torch.optim.AdamW
        assert optimizer.defaults["weight_decay"] == 0.1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"optimizer": "Adan"}, "There are ASGD, .*Adam"),
        ({"optimizer": "torch.optim"}, "'torch.optim'"),
        ({"optimizer_args": {"speed": 1}}, "speed"),
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"optimizer": "Muon"}, "Muon cannot be built"),
        ({"scheduler": "Cosine"}, "CosineAnnealingLR"),
        ({"scheduler": "StepLR"}, "step_size"),
        ({"norm": "batch"}, "There are custom"),
        ({"norm_args": {"epsilon": 1}}, "epsilon"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0; it must be from 0 to less than 1"),
    ],
)
def test_wrong_settings(settings, said):
    with pytest.raises(UserError, match=said):
        Classifier(**settings)


def test_a_schedule_over_an_endless_run_is_refused():
    with pytest.raises(UserError, match=r"--trainer.max_epochs"):
        fit(Classifier(scheduler="OneCycleLR"), max_epochs=-1, max_time="00:00:10:00")


def test_a_loss_that_is_not_a_number_shows():
    model = Classifier()
    with torch.no_grad():
        model.network.fc3.bias[0] = torch.nan
    assert fit(model).callback_metrics["train_loss_epoch"].isnan()


def test_a_checkpoint_is_plain_data_and_rebuilds_the_model(tmp_path):
    model = Classifier("builtin", {"eps": 1e-3}, "relu", "max", 0.1, "SGD", {"momentum": 0.9})
    trainer = fit(model)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    torch.load(tmp_path / "x.ckpt", weights_only=True)
    restored = Classifier.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert restored.hparams == model.hparams
    assert restored.network.norm1.eps == 1e-3
    images = torch.rand(4, 1, 28, 28)
    assert torch.equal(restored.eval()(images), model.eval()(images))


@pytest.mark.parametrize("norm", ["custom", "article"])
def test_accuracy_survives_a_checkpoint(tmp_path, norm):
    """The moving statistics are part of the state: as plain tensors they would be lost, and accuracy with them."""
    model = Classifier(norm)
    trainer = fit(model, max_epochs=2, limit_train_batches=1.0)
    [before] = trainer.validate(model, datamodule=trainer.datamodule, verbose=False)
    assert before["val_acc"] > 0.5
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    restored = Classifier.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    [after] = pl.Trainer(**QUIET).validate(restored, datamodule=FashionMNIST("sample"), verbose=False)
    assert after == before


def test_predictions_are_probabilities():
    model = Classifier()
    [*batches] = pl.Trainer(**QUIET).predict(model, datamodule=FashionMNIST("sample"))
    probabilities = torch.cat(batches)
    assert probabilities.shape == (1_000, 10)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(1_000))
