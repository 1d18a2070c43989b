"""The callback PreciseStatistics with any module, loader and trainer."""

import copy

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, WeightedRandomSampler

from bn_lightning import ExactResume, PreciseStatistics, UserError
from bn_lightning.training.seeds import statistics_order
from tests.projects.friedman.experiment import Regression, Table
from tests.support.plain_training import (
    QUIET,
    Residual,
    Rows,
    best,
    fit,
    inputs_of,
    shuffled,
    validation_loader,
)
from tests.support.pooled_statistics import pooled_statistics
from tests.support.precise import assert_statistics

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:The '.*_dataloader' does not have many workers",
    "ignore:The number of training batches",
    "ignore:Found 2 module\\(s\\) in eval mode",
)


def assert_same_parameters(one, other):
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def loaders():
    def of_sampler():
        generator = torch.Generator().manual_seed(9)
        return DataLoader(Rows(), 8, sampler=RandomSampler(Rows(), generator=generator))

    def of_processes():
        # Lightning sets its epoch.
        return DataLoader(Rows(), 8, sampler=DistributedSampler(Rows(), 1, 0, seed=4))

    def wrapped():
        # As Lightning wraps a sampler for several processes.
        generator = torch.Generator().manual_seed(2)
        sampler = WeightedRandomSampler(torch.arange(1, 53), 52, generator=generator)
        sampler = DistributedSamplerWrapper(sampler, num_replicas=1, rank=0)
        return DataLoader(Rows(), 8, sampler=sampler)

    def workers(**settings):
        return lambda: DataLoader(Rows(), 8, shuffle=True, num_workers=2, **settings)

    def with_generator():
        return DataLoader(Rows(), 8, shuffle=True, generator=torch.Generator().manual_seed(3))

    persistent = workers(persistent_workers=True)
    return [
        pytest.param(shuffled, id="plain"),
        pytest.param(with_generator, id="generator"),
        pytest.param(of_sampler, id="generator of the sampler"),
        pytest.param(of_processes, id="distributed sampler"),
        pytest.param(wrapped, id="sampler that Lightning has wrapped"),
        pytest.param(persistent, id="persistent workers"),
        pytest.param(workers(), id="workers", marks=pytest.mark.slow),
    ]


@pytest.mark.parametrize("loader", loaders())
def test_a_plain_loader_trains_the_same_and_checkpoints_have_the_statistics(tmp_path, loader):
    without, _ = fit([best(tmp_path / "without")], loader, tmp_path)
    precise = PreciseStatistics(4)
    module, _ = fit([precise, best(tmp_path)], loader, tmp_path)
    assert_same_parameters(without, module)

    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)["state_dict"]
    running = torch.load(tmp_path / "without/best.ckpt", weights_only=True)["state_dict"]
    # The order and the random numbers of these batches are an implementation detail. They are the
    # same in each estimate.
    for state in (saved, module.state_dict()):
        reference = Residual()
        reference.load_state_dict(state)
        batches = inputs_of(precise, loader)
        assert_statistics(state, reference, batches, rtol=1e-4, atol=1e-5)
        assert state["network.1.num_batches_tracked"] in (7, 14, 21)
    # The best validation may be another one, but the running statistics lag in each.
    assert not torch.allclose(running["network.1.running_var"], saved["network.1.running_var"])


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("at_epoch_end", [True, False, None])
def test_the_order_of_the_callbacks_does_not_matter(tmp_path, is_first, at_epoch_end):
    checkpoint = best(tmp_path)
    checkpoint._save_on_train_epoch_end = at_epoch_end
    precise = PreciseStatistics(3)
    callbacks = [precise, checkpoint] if is_first else [checkpoint, precise]

    fit(callbacks, shuffled, tmp_path)
    state = torch.load(tmp_path / "best.ckpt", weights_only=True)["state_dict"]
    reference = Residual()
    reference.load_state_dict(state)
    assert_statistics(state, reference, inputs_of(precise, shuffled))


def test_the_validation_metric_is_that_of_the_saved_network(tmp_path):
    checkpoint = best(tmp_path)

    fit([PreciseStatistics(3), checkpoint], shuffled, tmp_path)
    module = Residual()
    module.load_state_dict(torch.load(tmp_path / "best.ckpt", weights_only=True)["state_dict"])
    [found] = pl.Trainer(**QUIET).validate(module, validation_loader(), verbose=False)
    assert found["val_loss"] == pytest.approx(float(checkpoint.best_model_score), rel=1e-6)


def test_layers_in_eval_mode_are_left(tmp_path, capsys):
    """A network that is fine-tuned, whose first norms keep their statistics."""

    module = Residual()
    frozen = {"network.1": module.network[1], "network.3.bn1": module.network[3].bn1}
    for layer in frozen.values():
        layer.running_mean.normal_()
        layer.eval()
    before = {name: copy.deepcopy(layer.state_dict()) for name, layer in frozen.items()}
    fit([PreciseStatistics(3), best(tmp_path)], shuffled, tmp_path, module)
    out = capsys.readouterr().out
    assert "running statistics of 3 layer(s) are estimated" in out
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)["state_dict"]
    for name, layer in frozen.items():
        assert f"left: {name}: BatchNorm2d, it is in eval mode" in out
        assert not layer.training
        for buffer in ("running_mean", "running_var"):
            assert torch.equal(getattr(layer, buffer), before[name][buffer])
            assert torch.equal(saved[f"{name}.{buffer}"], before[name][buffer])
    assert module.network[4].bn1.training
    assert not torch.equal(module.network[4].bn1.running_mean, torch.zeros(6))


class OfBatches(Residual):
    """Augments whole batches in training, as on a GPU, and records the stage of each."""

    def __init__(self):
        super().__init__()
        self.stages = []

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.stages.append(self.trainer.training)
        inputs, targets = batch
        return (inputs + torch.randn(1) if self.trainer.training else inputs), targets


def test_batches_are_augmented_by_the_module_only_if_stated(tmp_path):
    truth, _ = fit([], shuffled, tmp_path, OfBatches(), {"enable_checkpointing": False})
    for augment, other in ((False, 3 * 3 + 3 * 4), (True, 3 * 3)):
        callbacks = [PreciseStatistics(3, augment=augment), best(tmp_path)]
        module, _ = fit(callbacks, shuffled, tmp_path, OfBatches(), {"num_sanity_val_steps": 0})
        assert_same_parameters(truth, module)
        # 3 epochs of 7 training and 3 validation batches; 4 estimates of 3 batches.
        assert len(module.stages) == 3 * 10 + 4 * 3
        assert module.stages.count(False) == other


def test_a_second_fit_with_the_same_trainer_is_like_the_first(tmp_path, capsys):
    def loader():
        return DataLoader(Rows(), 8)

    resume, precise = ExactResume(), PreciseStatistics(3)
    _, trainer = fit([precise, resume], loader, tmp_path)
    assert "estimated 4 time(s)" in capsys.readouterr().out
    names = [type(callback).__name__ for callback in trainer.callbacks]
    trainer.fit_loop.max_epochs = 5
    trainer.fit(trainer.lightning_module, loader(), validation_loader())
    assert [type(callback).__name__ for callback in trainer.callbacks] == names
    assert "estimated 3 time(s)" in capsys.readouterr().out  # two validations, and the end
    last = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    for name, value in last["precise_statistics"].items():
        assert torch.equal(trainer.lightning_module.get_buffer(name), value)


def test_an_exception_leaves_the_statistics_of_training(tmp_path):
    """The last batch of an estimate cannot be read."""

    class Fails(Rows):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            if self.reads == 52 + 8 * 2 + 3:
                raise OSError("planted")
            return super().__getitem__(index)

    module, dataset = Residual(), Fails()
    trainer = pl.Trainer(
        max_epochs=3, **QUIET, num_sanity_val_steps=0, callbacks=[PreciseStatistics(3)],
        enable_checkpointing=False,
    )  # fmt: skip
    validation = validation_loader()
    pl.seed_everything(1, verbose=False)
    with pytest.raises(OSError, match="planted"):
        trainer.fit(module, DataLoader(dataset, 8, shuffle=True), validation)
    truth, _ = fit(
        [],
        shuffled,
        tmp_path,
        trainer_settings={
            "max_epochs": 1, "num_sanity_val_steps": 0, "enable_checkpointing": False
        },
    )  # fmt: skip
    for name, value in truth.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name


def test_a_last_batch_of_one_sample_is_left_out(tmp_path):
    """Training does not reach it. A batch norm after a linear layer fails on it."""
    trainer = pl.Trainer(
        **QUIET, max_epochs=1, limit_train_batches=2, enable_checkpointing=False,
        default_root_dir=tmp_path, callbacks=[PreciseStatistics(10)],
    )  # fmt: skip
    module, data = Regression(norm="builtin"), Table(rows=61, batch_size=20)
    trainer.fit(module, datamodule=data)
    assert len(data.train_indices) == 61
    used = data.train_indices[statistics_order(61, 0)][:60]
    with torch.no_grad():
        values = module.network[0](data.inputs[used])
    torch.testing.assert_close(module.network[1].running_mean, values.mean(0))
    torch.testing.assert_close(module.network[1].running_var, values.var(0))


@pytest.mark.parametrize("num_batches", [0, -3])
def test_no_batches_are_refused(num_batches):
    with pytest.raises(UserError, match=f"num_batches is {num_batches}; it must be at least 1"):
        PreciseStatistics(num_batches)


def test_a_module_without_forward_is_refused_before_the_first_step(tmp_path):
    class NoForward(Residual):
        forward = pl.LightningModule.forward

    with pytest.raises(UserError, match=r"NoForward has no forward\(\)"):
        fit([PreciseStatistics(3)], lambda: DataLoader(Rows(), 8), tmp_path, NoForward(),
            {"num_sanity_val_steps": 0, "enable_checkpointing": False})  # fmt: skip


def test_several_training_loaders_are_refused_before_the_first_step(tmp_path):
    class Two(Residual):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    def loader():
        return {"a": DataLoader(Rows(), 8), "b": DataLoader(Rows(), 4)}

    with pytest.raises(UserError, match=r"returns 2 in a dict"):
        fit([PreciseStatistics(3)], loader, tmp_path, Two(), {"enable_checkpointing": False})


def test_the_expected_statistics_are_those_of_numpy():
    """The reference of these tests, on a single layer."""
    network = nn.Sequential(nn.BatchNorm2d(3))
    batches = [torch.randn(n, 3, 5, 4) * 2 + 1 for n in (4, 4, 3)]
    mean, var = pooled_statistics(network, batches)["0"]
    values = torch.cat(batches).numpy().astype(np.float64)
    np.testing.assert_allclose(mean, values.mean((0, 2, 3)))
    np.testing.assert_allclose(var, values.var((0, 2, 3), ddof=1))
