"""Batches of a Dataset are the same for any number of workers and ranks, and from any position."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, StackDataset

from bn_lightning.data.preprocessing import Preprocessing
from bn_lightning.data.transforms import Transforms
from bn_lightning.errors import UserError
from bn_lightning.training.batches import Epoch, TensorBatches
from bn_lightning.training.exact_data_loader import ExactDataLoader
from bn_lightning.training.worker_processes import WorkerFailed
from tests.conftest import REPOSITORY
from tests.support.runs import is_running


class Noisy(Dataset):
    """Samples with random numbers of the three global generators."""

    def __len__(self):
        return 53

    def __getitem__(self, index):
        noise = torch.rand(2) + np.random.rand() + random.random()
        return {"index": index, "noise": noise, "name": f"sample {index}"}


def trainer_at(epoch, batch=0, rank=0, world_size=1, training=True):
    progress = SimpleNamespace(current=SimpleNamespace(ready=batch))
    epoch_loop = SimpleNamespace(batch_progress=progress)
    return SimpleNamespace(
        current_epoch=epoch,
        training=training,
        overfit_batches=0,
        global_rank=rank,
        world_size=world_size,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        fit_loop=SimpleNamespace(restarting=batch > 0, epoch_loop=epoch_loop),
    )


def batches(num_workers=0, shuffle=True, **position):
    trainer = trainer_at(**{"epoch": 3, **position})
    loader = ExactDataLoader(Noisy(), 10, shuffle, num_workers, seed=7, trainer=trainer)
    found = list(loader)
    assert len(found) == len(loader) - position.get("batch", 0)
    return found


def named(batch):
    return zip(batch["name"], batch["noise"], strict=True)


def assert_same(found, expected):
    assert len(found) == len(expected) > 0
    for batch, other in zip(found, expected, strict=True):
        assert batch["name"] == other["name"]
        assert torch.equal(batch["noise"], other["noise"])


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_batch_depends_neither_on_the_workers_nor_on_the_batches_before(num_workers):
    expected = batches()
    assert_same(batches(num_workers), expected)
    assert_same(batches(num_workers, batch=4), expected[4:])
    assert_same(batches(batch=2), expected[2:])
    names = [name for batch in expected for name in batch["name"]]
    assert len(names) == 53 and sorted(names) == sorted(f"sample {i}" for i in range(53))
    other = batches(epoch=4)
    noise = dict(pair for batch in expected for pair in named(batch))
    assert names != [name for batch in other for name in batch["name"]]
    for batch in other:
        for name, x in named(batch):
            assert not torch.equal(x, noise[name])


@pytest.mark.parametrize(("shuffle", "training"), [(True, True), (False, False), (True, False)])
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_shards_of_all_ranks_form_the_batch(world_size, shuffle, training):
    expected = batches(shuffle=shuffle, training=training)
    ranks = [
        batches(rank, shuffle, rank=rank, world_size=world_size, training=training)
        for rank in range(world_size)
    ]
    for shards, batch in zip(zip(*ranks, strict=True), expected, strict=True):
        assert torch.equal(torch.cat([shard["noise"] for shard in shards]), batch["noise"])


def test_evaluation_is_in_order_and_the_same_in_each_pass():
    first = batches(shuffle=False, training=False)
    indices = torch.cat([batch["index"] for batch in first])
    assert torch.equal(indices, torch.arange(53))
    assert_same(batches(2, shuffle=True, training=False, epoch=9), first)
    # A last batch with fewer samples than ranks is joined to the batch before it.
    sizes = [
        [len(batch["index"]) for batch in ExactDataLoader(Noisy(), 13, trainer=trainer)]
        for trainer in (trainer_at(0, rank=rank, world_size=3, training=False) for rank in range(3))
    ]
    assert np.sum(sizes, axis=0).tolist() == [13, 13, 13, 14]


def test_reading_leaves_the_global_generators_unchanged():
    def next_numbers():
        return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()

    def seeded():
        torch.manual_seed(1), np.random.seed(1), random.seed(1)

    seeded()
    expected = next_numbers()
    for num_workers in (0, 1):
        seeded()
        batches(num_workers)
        assert next_numbers() == expected


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_those_of_tensors_in_memory(num_workers):
    """Augmented by index, then preprocessed, as the loader of tensors does."""
    images = torch.randint(256, (23, 3, 9, 12), dtype=torch.uint8)
    labels = torch.arange(23)
    crop = {"name": "RandomResizedCrop", "args": {"size": [9, 12]}}
    transforms = Transforms(
        [crop, {"name": "ColorJitter", "args": {"brightness": 0.5}}], (3, 9, 12)
    )
    preprocessing = Preprocessing(True, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    indices = torch.tensor([5, 2, 3, 7, 22, 11, 13, 17, 19])
    loader = ExactDataLoader(
        StackDataset(images, labels),
        4,
        True,
        num_workers,
        indices=indices,
        seed=3,
        trainer=trainer_at(2),
        augmentation=lambda epoch: transforms.of_epoch(23, 3, epoch),
        preprocessing=preprocessing,
    )
    order = loader.current_epoch().order
    augment = transforms.of_epoch(23, 3, 2)
    expected = TensorBatches(
        images, labels, indices, 4, lambda: Epoch(order, 0, augment), preprocessing=preprocessing
    )
    for found, batch in zip(loader, expected, strict=True):
        assert torch.equal(found[0], batch[0]) and torch.equal(found[1], batch[1])
    assert not torch.equal(order, indices) and torch.equal(order.sort()[0], indices.sort()[0])


class Failing(Noisy):
    def __init__(self, error):
        self.error = error

    def __getitem__(self, index):
        if index == 15:
            if isinstance(self.error, Exception):
                raise self.error
            os.kill(os.getpid(), self.error)
        return index


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_sample_that_cannot_be_read_is_named_without_a_trace(num_workers):
    missing = FileNotFoundError(2, "No such file or directory", "a.jpg")
    for error, message in (
        (UserError("a.jpg: not a readable image"), "a.jpg: not a readable image"),
        (missing, "Sample 15 cannot be read: FileNotFoundError: .*'a.jpg'"),
    ):
        with pytest.raises(WorkerFailed, match=f"^{message}$"):
            list(ExactDataLoader(Failing(error), 10, num_workers=num_workers))
    # A bug keeps its type.
    with pytest.raises(KeyError):
        list(ExactDataLoader(Failing(KeyError("x")), 10, num_workers=num_workers))


class Stream(IterableDataset):
    """It has a length, but no sample has a number."""

    def __len__(self):
        return 3

    def __iter__(self):
        return iter(range(3))


@pytest.mark.parametrize("dataset", [Stream(), iter([1, 2])])
def test_samples_without_numbers_are_refused(dataset):
    message = rf"cannot read {type(dataset).__name__}, because its samples cannot be indexed"
    with pytest.raises(UserError, match=message):
        ExactDataLoader(dataset, 10)


def test_a_negative_number_of_workers_is_refused():
    with pytest.raises(UserError, match="num_workers is -1; it must be 0 or more"):
        ExactDataLoader(Noisy(), 10, num_workers=-1)


def test_any_sequence_is_a_dataset():
    loader = ExactDataLoader([(i, str(i)) for i in range(7)], 3, num_workers=1)
    assert [(x.tolist(), y) for x, y in loader][1:] == [([3, 4, 5], ("3", "4", "5")), ([6], ("6",))]


def test_a_worker_that_is_killed_ends_the_pass():
    with pytest.raises(WorkerFailed, match=r"ended by SIGKILL. The system sends it if memory is"):
        list(ExactDataLoader(Failing(signal.SIGKILL), 10, num_workers=2))


def test_workers_end_with_the_last_batch():
    """Lightning asks for no batch after it, and keeps the iterator until the next epoch."""
    others = {*multiprocessing.active_children()}
    batches = iter(ExactDataLoader(Noisy(), 20, num_workers=2))
    next(batches)
    workers = {*multiprocessing.active_children()} - others
    assert len(workers) == 2
    assert [len(batch["name"]) for batch in islice(batches, 2)] == [20, 13]
    assert not workers & {*multiprocessing.active_children()}


UNFINISHED = []


def leave_a_pass_unfinished():
    # As in a process of a study.
    multiprocessing.set_start_method("forkserver", force=True)
    UNFINISHED.append(iter(ExactDataLoader(Noisy(), 10, num_workers=2)))
    next(UNFINISHED[0])
    kinds = {type(process).__name__ for process in multiprocessing.active_children()}
    assert kinds == {"ForkProcess"}


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
def test_a_process_can_end_within_a_pass():
    """Python ends the workers of such a process by SIGTERM, which they ignore, and waits."""
    process = multiprocessing.get_context("fork").Process(target=leave_a_pass_unfinished)
    process.start()
    process.join(timeout=60)
    code = process.exitcode
    process.kill()
    assert code == 0


def test_workers_ignore_the_signals_that_stop_a_run():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        assert list(ExactDataLoader(Failing(number), 10, num_workers=1))[5].tolist() == [50, 51, 52]


SLEEPING = """
import os, sys, time
from torch.utils.data import Dataset
from bn_lightning.training.exact_data_loader import ExactDataLoader

class Slow(Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, index):
        os.write(1, f"{os.getpid()}\\n".encode())
        time.sleep(600)

next(iter(ExactDataLoader(Slow(), 4, num_workers=2)))
"""


@pytest.mark.slow
def test_no_worker_outlives_a_parent_that_is_killed():
    parent = subprocess.Popen(
        [sys.executable, "-c", SLEEPING],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    try:
        workers = {int(parent.stdout.readline()) for _ in range(2)}
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 60
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline, "a worker is still running"
        time.sleep(0.05)
