"""Batches that are too small to train on are refused before the first step."""

import lightning.pytorch as pl
import pytest
import torch

from bn_lightning import Classifier, FashionMNIST, UserError
from tests.conftest import QUICK, command
from tests.projects.friedman.experiment import Regression, Table
from tests.support.logs import QUIET


def fit(model, data, **settings):
    pl.seed_everything(0)
    trainer = pl.Trainer(
        **QUIET, logger=False, **{"max_epochs": 1, "num_sanity_val_steps": 0} | settings
    )
    trainer.fit(model, datamodule=data)
    return trainer


@pytest.mark.parametrize(
    "norm", ["custom", "builtin", "renorm", "ghost", "article", "group", "none"]
)
@pytest.mark.parametrize(
    ("rows", "batch_size", "which"), [(31, 30, "The last batch of an epoch"), (3, 1, "A batch")]
)
def test_a_batch_of_one_sample_is_refused_if_the_network_fails_on_it(norm, rows, batch_size, which):
    """The norms of the other networks do not need a second sample."""
    model, data = Regression(norm=norm), Table(rows=rows, batch_size=batch_size)
    if norm in ("custom", "builtin", "renorm", "ghost"):
        with pytest.raises(UserError, match="Expected more than 1 value per channel") as refused:
            fit(model, data, limit_val_batches=0)
        message = str(refused.value)
        assert message.startswith(f"{which} has 1 sample(s), but the network cannot be trained")
        assert f"{rows} training samples in batches of {batch_size}." in message
        assert message.endswith(f"for example --data.batch_size {min(rows, 31)}.")
        assert model.trainer.global_step == 0
    else:
        assert fit(model, data, limit_val_batches=0).global_step == -(-rows // batch_size)


class Convolutional(Classifier):
    """Its norms see several values per channel for each image."""

    def __init__(self):
        super().__init__()
        self.network.norm3 = self.network.norm4 = torch.nn.Identity()


@pytest.mark.parametrize(
    "settings",
    [
        {"limit_train_batches": 1},
        {"max_steps": 1},
        {"max_steps": 1, "accumulate_grad_batches": 1},
        {"fast_dev_run": True},
    ],
)
def test_a_small_batch_that_is_not_reached_is_not_refused(settings):
    data = FashionMNIST("sample", batch_size=32, val_images=59_670)  # 33 training images
    trainer = fit(Classifier(), data, limit_val_batches=0, **settings)
    assert trainer.global_step == 1


def test_the_last_batch_is_reached_by_accumulation():
    settings = {"max_steps": 1, "accumulate_grad_batches": 2, "limit_val_batches": 0}
    with pytest.raises(UserError, match="The last batch of an epoch has 1 sample"):
        fit(Regression(), Table(rows=31, batch_size=30), **settings)


def test_the_trial_leaves_no_trace():
    """The random numbers and the buffers after it are those of a run without a trial."""
    found = []
    for rows in (31, 32):  # a trial is made for a last batch of one sample
        model = Regression(norm="article")
        before = [buffer.clone() for buffer in model.buffers()]

        def note(model=model, before=before):
            assert all(map(torch.equal, model.buffers(), before))
            found.append(torch.rand(1))

        model.on_train_epoch_start = note
        fit(model, Table(rows=rows, batch_size=30), limit_val_batches=0)
    assert found[0] == found[1]


def test_convolutional_norms_are_trained_on_one_image():
    data = FashionMNIST("sample", batch_size=32, val_images=59_670)  # 33 training images
    assert fit(Convolutional(), data, limit_val_batches=0).global_step == 2


def test_nothing_is_left_of_a_refused_run(main, tmp_path):
    code, _, err = main("fit", *QUICK, "--data.batch_size", 5_499)
    assert code == 2
    assert "Traceback" not in err
    assert "has 1 sample(s)" in err and "5,500 training samples in batches of 5499" in err
    assert list((tmp_path / "runs/lenet").iterdir()) == []


SYNCHRONIZED = ("--trainer.sync_batchnorm", "true", "--trainer.limit_val_batches", 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("--data.batch_size", 23), "3 sample(s), but the network cannot be trained on one sample"),
        (("--data.batch_size", 5_499), "1 sample(s), but 2 processes share each batch"),
        # 49 training images, so the last batch has 3 of them, too.
        (("--data.batch_size", 23, "--data.val_images", 59_510, *SYNCHRONIZED), ""),
    ],
)
def test_small_shards_on_two_processes(tmp_path, settings, message):
    few = ("--data.source", "sample", "--trainer.max_epochs", 1, "--trainer.devices", 2)
    done = command("fit", *few, *settings, cwd=tmp_path, check=False)
    assert done.returncode == (2 if message else 0), done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(list((tmp_path / "runs/lenet").iterdir())) == (0 if message else 1)
