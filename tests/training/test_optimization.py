"""Optimizers and schedulers by name, validated before a run."""

import lightning.pytorch as pl
import pytest
import torch

from bn_lightning import Classifier, UserError
from tests.projects.friedman.experiment import Regression, Table


def fit(settings, **trainer):
    """Train with 8 batches per epoch."""
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_epochs": 1,
    }
    pl.seed_everything(0)
    used = pl.Trainer(**quiet | trainer)
    used.fit(Regression(width=4, **settings), datamodule=Table(rows=200, batch_size=25))
    return used


class NoLength:
    """A loader without a length."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def lr_of(trainer):
    return trainer.optimizers[0].param_groups[0]["lr"]


def test_one_cycle_covers_the_whole_run():
    settings = {"lr": 0.5, "scheduler": "OneCycleLR", "scheduler_args": {"pct_start": 0.25}}
    trainer = fit(settings, max_epochs=2)
    [config] = trainer.lr_scheduler_configs
    assert config.interval == "step"
    assert config.scheduler.total_steps == 16
    assert config.scheduler.last_epoch == 16
    assert trainer.optimizers[0].param_groups[0]["max_lr"] == 0.5


def test_one_cycle_with_an_explicit_length():
    length = {"epochs": 4, "steps_per_epoch": 8}
    trainer = fit({"lr": 0.5, "scheduler": "OneCycleLR", "scheduler_args": length})
    [config] = trainer.lr_scheduler_configs
    assert (config.interval, config.scheduler.total_steps) == ("step", 32)
    assert config.scheduler.last_epoch == 8


def test_a_scheduler_with_a_peak_is_updated_after_each_step():
    cycle = {"base_lr": 0.001, "step_size_up": 4}
    trainer = fit({"lr": 0.01, "scheduler": "CyclicLR", "scheduler_args": cycle}, max_steps=4)
    assert lr_of(trainer) == pytest.approx(0.01)  # the peak is lr
    assert trainer.lr_scheduler_configs[0].interval == "step"


def test_cosine_annealing_reaches_zero():
    assert lr_of(fit({"scheduler": "CosineAnnealingLR"})) == pytest.approx(0, abs=1e-9)


def test_other_schedulers_are_updated_after_each_epoch():
    steps = {"step_size": 1, "gamma": 0.5}
    trainer = fit({"lr": 1.0, "scheduler": "StepLR", "scheduler_args": steps}, max_epochs=3)
    assert lr_of(trainer) == 0.125


def test_reduce_on_plateau_monitors_the_validation_loss():
    trainer = fit({"scheduler": "ReduceLROnPlateau", "scheduler_args": {"patience": 0}})
    assert trainer.lr_scheduler_configs[0].monitor == "val_loss"


def test_a_scheduler_can_be_an_import_path(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_schedules.py").write_text(
        "from torch.optim.lr_scheduler import LambdaLR\n\n\nclass Inverse(LambdaLR):\n"
        "    def __init__(self, optimizer, power=1.0):\n"
        "        super().__init__(optimizer, lambda epoch: (epoch + 1) ** -power)\n"
    )
    own = {"scheduler": "own_schedules.Inverse", "scheduler_args": {"power": 2.0}}
    assert lr_of(fit({"lr": 0.9, **own}, max_epochs=2)) == pytest.approx(0.1)


def test_an_optimizer_can_be_a_name_or_an_import_path():
    for name in ("AdamW", "torch.optim.AdamW"):
        model = Regression(optimizer=name, lr=0.01, optimizer_args={"weight_decay": 0.1})
        optimizer = model.configure_optimizers()
        assert type(optimizer) is torch.optim.AdamW
        assert optimizer.defaults["weight_decay"] == 0.1


@pytest.mark.parametrize("task", [Classifier, Regression])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "Adan"}, "Use one of ASGD, .*Adam"),
        ({"optimizer": "torch.optim"}, "'torch.optim'"),
        ({"optimizer_args": {"speed": 1}}, "speed"),
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"optimizer": "Muon"}, "Muon cannot be created"),
        ({"scheduler": "Cosine"}, "CosineAnnealingLR"),
        ({"scheduler": "StepLR"}, "step_size"),
        ({"scheduler": "torch.optim.lr_scheduler.bisect_right"}, "is not a class"),
    ],
)
def test_invalid_settings_are_refused(task, settings, message):
    with pytest.raises(UserError, match=message):
        task(**settings)


def test_a_schedule_that_needs_a_length_is_refused_without_a_limit():
    with pytest.raises(UserError, match=r"--trainer.max_epochs"):
        fit({"scheduler": "OneCycleLR"}, max_epochs=-1, max_time="00:00:10:00")


def test_a_schedule_that_needs_a_length_is_refused_with_a_loader_that_has_none():
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False)
    batches = NoLength([(torch.ones(2, 10), torch.ones(2))])
    with pytest.raises(UserError, match=r"loader has no length.*\n.*--trainer.max_steps"):
        trainer.fit(Regression(width=4, scheduler="OneCycleLR"), batches)


def test_a_schedule_cannot_be_resumed_with_another_length(tmp_path):
    """The same length is accepted, and so is a schedule with an explicit length."""
    for name, arguments in (("OneCycleLR", {}), ("CosineAnnealingLR", {"T_max": 16})):
        settings = {"scheduler": name, "scheduler_args": arguments}
        trainer = fit(settings, max_epochs=2)
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")

    def resume(name, arguments, epochs):
        quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
        trainer = pl.Trainer(**quiet, enable_checkpointing=False, max_epochs=epochs)
        model = Regression(width=4, scheduler=name, scheduler_args=arguments)
        path = tmp_path / f"{name}.ckpt"
        data = Table(rows=200, batch_size=25)
        trainer.fit(model, datamodule=data, ckpt_path=path, weights_only=True)

    with pytest.raises(
        UserError, match=r"OneCycleLR was configured for 16 steps, .* would have 24"
    ):
        resume("OneCycleLR", {}, epochs=3)
    resume("OneCycleLR", {}, epochs=2)
    resume("CosineAnnealingLR", {"T_max": 16}, epochs=3)


# Weight decay and warmup


def test_norms_and_biases_are_exempt_from_weight_decay():
    arguments = {"weight_decay": 0.5, "momentum": 0.9}
    model = Regression(width=4, optimizer_args=arguments, decay_norms_and_biases=False)
    decayed, exempt = model.configure_optimizers().param_groups
    names = {parameter: name for name, parameter in model.network.named_parameters()}
    assert [names[p] for p in decayed["params"]] == ["0.weight", "3.weight"]
    assert {names[p] for p in exempt["params"]} == {"0.bias", "1.weight", "1.bias", "3.bias"}
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.5, 0.0)
    [group] = Regression(width=4, optimizer_args=arguments).configure_optimizers().param_groups
    assert group["weight_decay"] == 0.5 and len(group["params"]) == 6


class Rates(pl.Callback):
    """Records the learning rate of each optimizer step."""

    def __init__(self):
        self.used = []

    def on_fit_start(self, trainer, pl_module):
        trainer.optimizers[0].register_step_pre_hook(
            lambda optimizer, *_: self.used.append(optimizer.param_groups[0]["lr"])
        )


@pytest.mark.parametrize("scheduler", [None, "OneCycleLR", "StepLR"])
def test_a_warmup_multiplies_the_learning_rates_of_the_schedule(scheduler):
    arguments = {"StepLR": {"step_size": 1, "gamma": 0.5}}.get(scheduler)
    used = {}
    for steps in (0, 5):
        rates = Rates()
        settings = {"scheduler": scheduler, "scheduler_args": arguments, "warmup_steps": steps}
        fit({name: v for name, v in settings.items() if v is not None}, callbacks=[rates])
        used[steps] = rates.used
    factors = [min(1, (step + 1) / 5) for step in range(len(used[0]))]
    expected = [factor * rate for factor, rate in zip(factors, used[0], strict=True)]
    assert len(expected) > 5 and used[5] == pytest.approx(expected)
