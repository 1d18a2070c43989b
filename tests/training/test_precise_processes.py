"""Precise statistics of several processes, and of the batches that are read by workers."""

import json

import pytest
import torch

from bn_lightning.deploy import served
from bn_lightning.training import checkpoints
from bn_lightning.training.exact_data_loader import ExactDataLoader
from tests.benchmarks.photographs import write_photographs
from tests.conftest import QUICK, command, run_here, weights
from tests.support.precise import assert_statistics, batches_of
from tests.support.runs import result_of

LAST, BEST = "checkpoints/last.ckpt", "checkpoints/best.ckpt"
EXACT = (
    *(*QUICK, "--trainer.max_steps", 12, "--trainer.val_check_interval", "0.5"),
    *("--trainer.precision", "64-true", "--data.flip", "true", "--precise_statistics", 3),
    *("--data.batch_size", 250, "--monitor", "false", "--trainer.strategy", "ddp"),
)


def run(cwd, name, *settings):
    command("fit", *EXACT, "--name", name, *settings, cwd=cwd)
    return cwd / "runs" / name / "0"


def statistics_of(folder):
    last = torch.load(folder / LAST, weights_only=True)
    best = {name: it for name, it in weights(folder / BEST).items() if "running" in name}
    return {"best": best, "last": last["precise_statistics"], "running": last["state_dict"]}


@pytest.mark.slow
def test_synchronized_statistics_are_those_of_one_process(tmp_path):
    one, two = (
        run(tmp_path, str(n), "--trainer.devices", n, "--trainer.sync_batchnorm", "true")
        for n in (1, 2)
    )
    first, second = map(statistics_of, (one, two))
    assert len(first["last"]) == 8
    for kind, found in first.items():
        for name, value in found.items():
            torch.testing.assert_close(second[kind][name], value, rtol=0, atol=1e-9)
    for name in ("val_acc", "test_acc", "steps"):
        assert result_of(one)[name] == result_of(two)[name]


AGREE = """\
import lightning.pytorch as pl
import torch
import torch.distributed as dist


class Agree(pl.Callback):
    def on_validation_end(self, trainer, pl_module):
        for name, buffer in pl_module.named_buffers():
            if "running" in name:
                both = [torch.empty_like(buffer) for _ in range(2)]
                dist.all_gather(both, buffer.contiguous())
                assert torch.equal(*both), name
        if trainer.is_global_zero:
            print("all ranks agree", flush=True)
"""


@pytest.mark.slow
def test_without_synchronization_all_ranks_have_the_statistics_of_all_batches(tmp_path):
    (tmp_path / "agree.py").write_text(AGREE)
    given = ("--trainer.callbacks+=agree.Agree", "--trainer.devices", 2)
    done = command("fit", *EXACT, *given, cwd=tmp_path)
    assert done.stdout.count("all ranks agree") == 2
    assert done.stdout.count("precise statistics: estimated 3 time(s)") == 1


# Pictures in files, read by workers


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """The working directory of a run on colour JPEGs. No test may change it."""
    cwd = tmp_path_factory.mktemp("pictures")
    write_photographs(cwd / "pictures", 120, width=40, height=30)
    crop = {"name": "RandomCrop", "args": {"size": 16, "padding": 4}}
    settings = (
        *("--data.dataset", "folder", "--data.resize", 16, "--data.batch_size", 20),
        *("--data.dataset_args.path", "pictures", "--data.augment", json.dumps([crop])),
        *("--model.network", "resnet", "--model.network_args.depth", 8),
        *("--model.network_args.width", 4, "--model.norm", "builtin"),
        *("--trainer.max_epochs", 1, "--trainer.limit_train_batches", 3, "--monitor", "false"),
    )
    for workers in (2, 0):
        given = ("--data.workers", workers, "--name", f"workers-{workers}")
        run_here("fit", *settings, *given, "--precise_statistics", 3, cwd=cwd)
    run_here("fit", *settings, "--data.workers", 2, "--name", "without", cwd=cwd)
    return cwd


def test_statistics_of_pictures_do_not_depend_on_the_workers(pictures):
    two, none, without = (
        torch.load(pictures / "runs" / name / "0" / LAST, weights_only=True)
        for name in ("workers-2", "workers-0", "without")
    )
    for name, value in without["state_dict"].items():
        assert torch.equal(two["state_dict"][name], value), name
    assert two["precise_statistics"]
    for name, value in two["precise_statistics"].items():
        assert torch.equal(none["precise_statistics"][name], value), name


def test_statistics_of_pictures_are_those_of_unaugmented_samples(pictures, monkeypatch):
    """The run crops its training samples at random places."""
    monkeypatch.chdir(pictures)
    folder = pictures / "runs/workers-2/0"
    restored = served.restore(str(folder / LAST), "bn_lightning.experiment:EXPERIMENT")
    data = restored.data
    data.prepare_data()
    data.setup("fit")
    assert isinstance(data.train_dataloader(), ExactDataLoader)
    batches = batches_of(data, 3)
    assert [len(batch) for batch in batches] == [20, 20, 20]
    network = restored.task.network.requires_grad_(False)
    for checkpoint in (LAST, BEST):
        state = checkpoints.weights_to_evaluate(torch.load(folder / checkpoint, weights_only=True))
        network.load_state_dict({n.removeprefix("network."): it for n, it in state.items()})
        state = network.state_dict()
        assert_statistics(state, network.to(memory_format=torch.contiguous_format), batches)
