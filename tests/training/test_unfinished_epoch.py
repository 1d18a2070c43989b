"""Saving and restoring the metrics of an unfinished epoch on any number of processes."""

import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchmetrics import (
    CatMetric,
    MaxMetric,
    MeanMetric,
    MeanSquaredError,
    MetricCollection,
    MinMetric,
    PearsonCorrCoef,
    R2Score,
    SumMetric,
)

from bn_lightning import UserError
from bn_lightning.training import unfinished_epoch

# Metrics that are updated with outputs and targets; others are updated with values.
PAIRED = (MeanSquaredError, R2Score, PearsonCorrCoef)
SUMS = (MeanMetric, SumMetric, MeanSquaredError, R2Score)
KINDS = (*SUMS, CatMetric, MaxMetric, MinMetric)


def updated(kind, rank, batches=2):
    """Return a metric after some batches of one rank."""
    metric = kind()
    generator = torch.Generator().manual_seed(rank)
    for _ in range(batches):
        outputs, targets = torch.randn(2, 5 + rank, generator=generator)
        metric.update(outputs, targets) if kind in PAIRED else metric.update(outputs)
    return metric


def saved_by(metrics):
    """Return the states in a checkpoint of several ranks, given the metric of each rank."""
    parts = [unfinished_epoch.save({"m": metric}, world_size=1) for metric in metrics]
    return {
        key: torch.cat([part[key] for part in parts])
        if isinstance(parts[0][key], torch.Tensor)
        else [part[key][0] for part in parts]
        for key in parts[0]
    }


def restored(kind, saved, world_size):
    """Return the restored metric of each rank."""
    metrics = [kind() for _ in range(world_size)]
    for rank, metric in enumerate(metrics):
        unfinished_epoch.restore({"m": metric}, saved, rank, world_size)
    return metrics


def over_all(metrics):
    """Compute a metric over all ranks as torchmetrics does, by reducing each state."""
    combined = type(metrics[0])()
    for state, reduce in combined._reductions.items():
        values = [getattr(metric, state) for metric in metrics]
        if isinstance(values[0], list):
            setattr(combined, state, [part for value in values for part in value])
        else:
            setattr(combined, state, reduce(torch.stack(values)))
    combined._update_count = 1
    return combined.compute()


@pytest.mark.parametrize("kind", [*KINDS, PearsonCorrCoef])
def test_one_process_restores_its_metrics_exactly(kind, tmp_path):
    metric = updated(kind, rank=0)
    torch.save(unfinished_epoch.save({"m": metric}, world_size=1), tmp_path / "states")
    again = kind()
    saved = torch.load(tmp_path / "states", weights_only=True)
    unfinished_epoch.restore({"m": again}, saved, rank=0, world_size=1)
    for one in (metric, again):
        values = torch.randn(2, 4, generator=torch.Generator().manual_seed(9))
        one.update(*values) if kind in PAIRED else one.update(values[0])
    assert torch.equal(again.compute(), metric.compute())
    for state, value in metric.metric_state.items():
        if isinstance(value, torch.Tensor):
            assert getattr(again, state).dtype == value.dtype, state


@pytest.mark.parametrize("kind", [*KINDS, PearsonCorrCoef])
def test_the_same_number_of_ranks_restores_the_state_of_each_rank(kind):
    before = [updated(kind, rank) for rank in range(3)]
    after = restored(kind, saved_by(before), world_size=3)
    for old, new in zip(before, after, strict=True):
        for state, value in old.metric_state.items():
            torch.testing.assert_close(getattr(new, state), value, rtol=0, atol=0)


@pytest.mark.parametrize("now", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_ranks_computes_the_same_value(kind, now):
    before = [updated(kind, rank) for rank in range(3)]
    after = restored(kind, saved_by(before), world_size=now)
    torch.testing.assert_close(over_all(after), over_all(before), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_without_samples_does_not_change_the_value(kind):
    """Its state may be an empty list or an infinite value."""
    before = [updated(kind, 0), kind()]
    for now in (1, 2, 3):
        after = restored(kind, saved_by(before), world_size=now)
        assert torch.equal(over_all(after), over_all(before))


class Nested(nn.Module):
    """Metrics in several places, two of which share their state."""

    def __init__(self):
        super().__init__()
        pair = [MeanSquaredError(), MeanSquaredError(squared=False)]
        self.groups = nn.ModuleDict({"a": MetricCollection({"mse": pair[0], "rmse": pair[1]})})
        self.many = nn.ModuleList([MeanMetric(), MaxMetric()])
        self.unused = SumMetric()


def test_metrics_are_found_anywhere_in_a_module():
    module, again, whole = Nested(), Nested(), Nested()
    batches = [torch.rand(2, 4, generator=torch.Generator().manual_seed(n)) for n in range(6)]

    def train(module, batches):
        for outputs, targets in batches:
            module.groups["a"].update(outputs, targets)
            for metric in module.many:
                metric.update(outputs)

    train(whole, batches)
    train(module, batches[:3])
    metrics = unfinished_epoch.updated(unfinished_epoch.metrics_of(module), world_size=1)
    saved = unfinished_epoch.save(metrics, world_size=1)
    assert not any(key.startswith("unused") for key in saved)
    unfinished_epoch.restore(unfinished_epoch.metrics_of(again), saved, rank=0, world_size=1)
    for name, metric in unfinished_epoch.metrics_of(module).items():
        assert unfinished_epoch.metrics_of(again)[name].update_count == metric.update_count
    train(again, batches[3:])
    assert again.groups["a"].compute() == whole.groups["a"].compute()
    for one, other in zip(again.many, whole.many, strict=True):
        assert torch.equal(one.compute(), other.compute())


def test_a_state_that_cannot_be_redistributed_is_refused():
    saved = saved_by([updated(PearsonCorrCoef, rank) for rank in range(2)])
    with pytest.raises(UserError, match=r"(?s)metric m cannot .*Resume with 2 process") as it:
        restored(PearsonCorrCoef, saved, world_size=3)
    assert "'mean_x'" in str(it.value)


def test_states_of_metrics_that_no_longer_exist_are_ignored():
    saved = unfinished_epoch.save({"old": updated(SumMetric, 0)}, world_size=1)
    metric = updated(SumMetric, 1)
    before = metric.compute()
    unfinished_epoch.restore({"new": metric}, saved, rank=0, world_size=1)
    assert metric.compute() == before
    other = MeanSquaredError()
    unfinished_epoch.restore({"old": other}, saved, rank=0, world_size=1)
    assert not hasattr(other, "sum_value")


def save_on_rank(rank, world_size, port, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    # Rank 0 has no batches.
    metrics = {"cat": updated(CatMetric, rank, batches=rank), "r2": updated(R2Score, rank)}
    saved = unfinished_epoch.save(metrics, world_size)
    torch.save(saved, path.with_name(f"rank-{rank}"))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_each_rank_saves_the_states_of_all_ranks(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(save_on_rank, (2, port, tmp_path / "rank"), nprocs=2)
    expected = saved_by([updated(R2Score, rank) for rank in range(2)])
    for rank in range(2):
        saved = torch.load(tmp_path / f"rank-{rank}", weights_only=True)
        for key, value in expected.items():
            assert torch.equal(saved[key.replace("m.", "r2.")], value), key
        none, some = saved["cat.value"]
        assert none == [] and torch.equal(some[0], updated(CatMetric, 1, batches=1).value[0])
