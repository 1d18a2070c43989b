"""The training of a task on one batch."""

import copy
from pathlib import Path

from torchmetrics import Metric

from bn_lightning.testing import batches
from bn_lightning.testing.experiments import ExperimentTests
from bn_lightning.testing.own_generators import generators_in
from bn_lightning.testing.tasks.fitted import Fitted, outputs_of
from bn_lightning.testing.tasks.watch import Watch
from bn_lightning.training.batches import ExactLoader

# The batch has at most this number of samples, and is trained on at most this number of
# times.
SAMPLES, STEPS = 32, 240
# Settings that are only about the length of a run.
ONE_EPOCH = (
    *("--trainer.max_epochs", "1", "--trainer.max_steps", "-1"),
    *("--trainer.limit_train_batches", "1.0", "--trainer.accumulate_grad_batches", "1"),
    *("--trainer.limit_val_batches", "1.0", "--trainer.limit_test_batches", "1.0"),
    *("--trainer.check_val_every_n_epoch", "1", "--trainer.val_check_interval", "1.0"),
    *("--trainer.num_sanity_val_steps", "0", "--trainer.enable_checkpointing", "false"),
    *("--trainer.logger", "false", "--monitor", "false", "--precise_statistics", "0"),
)
# Settings of `Task`. A subclass may lack some of them.
PLAIN = {"scheduler": "null", "warmup_steps": "0", "compile": "false"}
PLAIN |= {"memory_format": "contiguous"}


def fit(tests: type[ExperimentTests], folder: Path, fraction: float) -> Fitted:
    """Train on one batch until the loss is low.

    The learning rate of the experiment may be too high without its schedule, so two
    other settings are tried if the loss does not fall.
    """
    model = tests.build().config.fit.model
    plain = _flags({name: value for name, value in PLAIN.items() if name in model})
    settings: dict[str, tuple[str, ...]] = {"the settings of the experiment": ()}
    if "lr" in model:
        lr = float(model.lr)
        settings[f"learning rate {lr / 10:g}"] = _flags({"lr": f"{lr / 10}"})
    if {"lr", "optimizer", "optimizer_args"} <= set(vars(model)):
        adam = {"optimizer": "AdamW", "optimizer_args": "null", "lr": "0.01"}
        settings["AdamW with learning rate 0.01"] = _flags(adam)
    for flags in settings.values():
        fitted = _fit_once(tests, (*plain, *flags), folder, fraction)
        if fitted.watch.has_fallen:
            break
    fitted.tried = list(settings)
    return fitted


def _flags(model: dict[str, str]) -> tuple[str, ...]:
    return tuple(word for name, value in model.items() for word in (f"--model.{name}", value))


def _fit_once(
    tests: type[ExperimentTests], flags: tuple[str, ...], folder: Path, fraction: float
) -> Fitted:
    cli = tests.build(*ONE_EPOCH, "--trainer.default_root_dir", str(folder), *flags)
    task, data, trainer = cli.model, cli.datamodule, cli.trainer
    data.trainer = trainer
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    batch = next(iter(loader))
    batch = batches.part(batch, 0, min(SAMPLES, batches.count(batch)))
    new_metrics = {
        name: copy.deepcopy(module)
        for name, module in task.named_children()
        if isinstance(module, Metric)
    }
    watch = Watch(fraction)
    trainer.callbacks.append(watch)  # type: ignore[attr-defined]
    # An attribute of the object hides the method of its class.
    vars(data)["train_dataloader"] = lambda: batches.FixedBatches([batch] * STEPS)
    vars(data)["val_dataloader"] = lambda: batches.FixedBatches([batch])
    try:
        trainer.fit(task, datamodule=data)
    finally:
        del vars(data)["train_dataloader"], vars(data)["val_dataloader"]
    trainer.callbacks.remove(watch)  # type: ignore[attr-defined]
    checkpoint = folder / "trained.ckpt"
    trainer.save_checkpoint(checkpoint, weights_only=False)
    # Without a trainer, self.log() in a step does nothing.
    task.trainer = None
    outputs = outputs_of(task, batch)
    is_exact = isinstance(loader, ExactLoader)
    generators = generators_in(getattr(loader, "dataset", None))
    return Fitted(cli, batch, watch, new_metrics, checkpoint, outputs, is_exact, generators)
