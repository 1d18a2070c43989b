"""The base class of data modules: settings, loaders, and the identity of the data."""

import re
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from bn_lightning import DataModule, FashionMNIST, UserError
from bn_lightning.training import data_module
from tests.projects.friedman.experiment import Regression, Table

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


class Numbers(DataModule):
    """A minimal data module: the numbers from 0 to 49, and whether they are odd."""

    def setup(self, stage=""):
        self.inputs = torch.arange(50)

    def train_dataloader(self):
        return self.train_batches(self.inputs, self.inputs % 2, torch.arange(10, 50))


def fit(data, ckpt_path=None, epochs=1):
    torch.manual_seed(0)
    trainer = pl.Trainer(**QUIET, max_epochs=epochs)
    trainer.fit(Regression(width=4), datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


# Settings and defaults


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"seed": -1}, "The seed is -1; it must not be negative"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Numbers(**settings)


def test_settings_include_those_of_the_subclass_and_of_the_base_class():
    data = Table(rows=20, batch_size=5, seed=3)
    own = {"rows": 20, "fold": 2, "folder": "tables"}
    assert dict(data.hparams) == {**own, "batch_size": 5, "seed": 3}


def test_defaults_of_a_minimal_data_module():
    data = Numbers()
    assert (data.classes, data.validates_on_test_set, data.describe()) == (None, False, "Numbers")
    assert (data.machine_settings, data.source_settings, data.import_paths) == ((), (), ())
    assert list(data.fixed_settings) == ["seed"]
    assert (data.identity(), data.augmentation(0)) == ({}, None)
    assert data.draw(torch.zeros(3, 4)) is None
    assert isinstance(data.preprocessing, nn.Identity)
    for missing in (data.test_samples, data.example_input):
        with pytest.raises(UserError, match=r"Numbers has no test_samples\(\)"):
            missing()
    with pytest.raises(UserError, match=r"Numbers cannot read files\. Remove --data\.images"):
        data.read_files(["a.png"], None)


def test_the_example_input_is_a_copy_of_seven_raw_samples():
    data = Table(rows=20)
    example = data.example_input()
    inputs, _ = data.test_samples()
    assert torch.equal(example, inputs[:7])
    example.zero_()
    assert inputs[:7].abs().sum() > 0


# Loaders


def test_each_epoch_visits_all_training_samples_in_a_different_order():
    data = Numbers(batch_size=16, seed=3)
    data.setup()
    loader = data.train_dataloader()
    assert torch.equal(data.train_indices, torch.arange(10, 50))
    orders = [data.train_order(epoch).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(10, 50)) for order in orders)
    assert len(set(map(tuple, orders))) == 3
    assert torch.cat([inputs for inputs, _ in loader]).tolist() == orders[0]
    other = Numbers(batch_size=16, seed=4)
    other.train_indices = data.train_indices
    assert other.train_order(0).tolist() != orders[0]


def test_the_loader_augments_samples_according_to_the_epoch():
    seen = []

    class Noted(Table):
        def augmentation(self, epoch):
            def augment(samples, indices):
                seen.append((epoch, indices.tolist()))
                return samples

            return augment

    data = Noted(rows=20, batch_size=8)
    fit(data, epochs=2)
    assert [epoch for epoch, _ in seen] == [0, 0, 0, 1, 1, 1]
    for epoch in (0, 1):
        visited = [index for number, batch in seen for index in batch if number == epoch]
        assert visited == data.train_order(epoch).tolist()


def test_overfit_batches_repeats_the_same_batches_in_each_epoch():
    data = Numbers(batch_size=16)
    data.train_indices = torch.arange(50)
    data.trainer = SimpleNamespace(overfit_batches=2)
    assert torch.equal(data.train_order(0), data.train_order(5))
    assert torch.equal(data.train_order(0), torch.arange(50))


def test_evaluation_of_fewer_samples_than_processes_is_refused():
    data = Numbers(batch_size=1)
    data.trainer = SimpleNamespace(
        world_size=3, global_rank=0, strategy=SimpleNamespace(root_device=torch.device("cpu"))
    )
    data.setup()
    assert len(data.batches(data.inputs, data.inputs)) == 16  # the last one has 5
    with pytest.raises(UserError, match=r"3 processes cannot share 2 sample\(s\)"):
        data.batches(data.inputs, data.inputs, torch.arange(2))


def test_evaluation_visits_each_sample_once_in_order():
    data = Numbers(batch_size=16)
    data.setup()
    for indices in (None, torch.tensor([4, 2, 9])):
        visited = torch.cat([i for i, _ in data.batches(data.inputs, data.inputs, indices)])
        assert torch.equal(visited, torch.arange(50) if indices is None else indices)


# The identity of the data in a checkpoint


@pytest.mark.parametrize("kind", [Table, type("Renamed", (Table,), {})])
def test_a_checkpoint_contains_the_identity_under_the_same_key_for_each_class(tmp_path, kind):
    data = kind(rows=100)
    fit(data).save_checkpoint(tmp_path / "x.ckpt")
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert content["data"] == {"source": "formula", "sha256": {"table": data.checksum}}
    assert kind.identity_in(content) == content["data"]


def test_an_old_checkpoint_contains_the_identity_under_the_class_name():
    old = {"FashionMNIST": {"source": "sample", "sha256": {"a": "1"}}}
    assert FashionMNIST.identity_in(old) == old["FashionMNIST"]
    assert Table.identity_in(old) == {}
    assert FashionMNIST.identity_in(old | {"data": {"source": "system"}}) == {"source": "system"}
    assert FashionMNIST.identity_in({}) == {}


def test_a_run_is_not_resumed_with_other_data(tmp_path):
    path = tmp_path / "x.ckpt"
    fit(Table(rows=100)).save_checkpoint(path)
    with pytest.raises(UserError) as refused:
        fit(Table(rows=120), ckpt_path=path, epochs=2)
    message = str(refused.value)
    assert "was trained on other data (source formula)" in message
    assert "Friedman's problem, 120 rows" in message  # the current data
    assert "--data.rows 100 (now 120)" in message
    assert fit(Table(rows=100), ckpt_path=path, epochs=2).current_epoch == 2


def test_a_run_resumes_with_another_data_folder(tmp_path):
    path = tmp_path / "x.ckpt"
    fit(Table(rows=100)).save_checkpoint(path)
    assert fit(Table(rows=100, folder="elsewhere"), ckpt_path=path, epochs=2).current_epoch == 2


def test_a_checkpoint_can_be_tested_on_other_data(tmp_path):
    path = tmp_path / "x.ckpt"
    fit(Table(rows=100)).save_checkpoint(path)
    trainer = pl.Trainer(**QUIET)
    model, data = Regression(width=4), Table(rows=120)
    [found] = trainer.test(model, datamodule=data, ckpt_path=path, verbose=False, weights_only=True)
    assert found["test_rmse"] > 0


@pytest.mark.parametrize(
    ("before", "now", "is_same"),
    [
        ({"source": "system", "sha256": "1"}, {"source": "download", "sha256": "1"}, True),
        ({"sha256": "1"}, {"sha256": "2"}, False),
        ({"sha256": "1"}, {}, False),
        # Entries that the checkpoint does not contain are not compared.
        ({}, {"sha256": "2"}, True),
        ({"rows": 3}, {"rows": 3, "sha256": "2"}, True),
    ],
)
def test_all_entries_of_the_identity_except_the_source_are_compared(before, now, is_same):
    data = Numbers()
    data.identity = lambda: now
    checkpoint = {data_module.IDENTITY: before}
    if is_same:
        data.refuse_other_data(checkpoint)
    else:
        with pytest.raises(UserError, match=re.escape("was trained on other data")):
            data.refuse_other_data(checkpoint)
