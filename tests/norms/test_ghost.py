"""Ghost batch normalization, compared with torch's batch normalization of each virtual batch."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bn_lightning import BatchNorm, LayerSync, UserError
from bn_lightning.norms import recognition
from bn_lightning.norms.ghost import GhostBatchNorm
from tests.support.new_norms import assert_rounded_once, output_and_gradients, shaken
from tests.support.norm_batches import TORCH, scattered

# For each number of dimensions: the shape of a batch, and its virtual batches of 4 samples.
# After a linear layer, the last sample has one value per channel.
BATCHES = {
    2: ((9, 5), (4, 5)),
    3: ((10, 5, 7), (4, 4, 2)),
    4: ((9, 5, 3, 2), (4, 4, 1)),
    5: ((8, 5, 2, 1, 3), (4, 4)),
}


def sequential(x, sizes, norm, momenta):
    """Return torch's batch normalization of each part, which updates the statistics of `norm`."""
    statistics = norm.running_mean, norm.running_var
    parts = zip(x.split(sizes), momenta, strict=False)
    parameters = norm.weight, norm.bias
    return torch.cat(
        [F.batch_norm(part, *statistics, *parameters, True, m, norm.eps) for part, m in parts]
    )


@pytest.mark.parametrize("num_dims", BATCHES)
@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_training_equals_torchs_function_on_each_virtual_batch(
    num_dims, momentum, dtype, tolerance
):
    shape, sizes = BATCHES[num_dims]
    options = {"virtual_batch_size": 4, "momentum": momentum, "eps": 1e-3}
    layer = shaken("ghost", 5, num_dims, dtype, **options)
    reference = copy.deepcopy(layer)
    for step in range(2):
        x = scattered(shape, dtype, seed=step)
        seen = step * len(sizes)
        momenta = [momentum or 1 / (seen + i + 1) for i in range(len(sizes))]
        ours = output_and_gradients(layer, x, layer.weight, layer.bias)
        theirs = output_and_gradients(
            lambda x, momenta=momenta: sequential(x, sizes, reference, momenta),
            x, reference.weight, reference.bias,
        )  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(
            getattr(layer, name), getattr(reference, name), rtol=tolerance, atol=tolerance
        )
    assert layer.num_batches_tracked == 2 * len(sizes)
    # Other virtual batches give another output.
    assert not torch.allclose(layer(x), F.batch_norm(x, None, None, training=True))


@pytest.mark.parametrize("num_dims", BATCHES)
def test_half_precision_input_is_computed_in_float32(num_dims):
    (shape, sizes), layer = BATCHES[num_dims], shaken("ghost", 5, num_dims, virtual_batch_size=4)
    exact = copy.deepcopy(layer).double()
    for dtype in (torch.bfloat16, torch.float16):
        x = scattered(shape, dtype)
        y = layer(x)
        assert y.dtype == dtype
        assert_rounded_once(y, sequential(x.double(), sizes, exact, [0.1] * 3))
    torch.testing.assert_close(layer.running_var.double(), exact.running_var, rtol=1e-5, atol=1e-5)


def test_eval_mode_and_state_are_those_of_batch_norm():
    x = scattered((9, 5, 3, 2))
    ghost = shaken("ghost", 5, 4, virtual_batch_size=4)
    for other in (BatchNorm(5), nn.BatchNorm2d(5)):
        other.load_state_dict(ghost.state_dict())
        torch.testing.assert_close(other.eval()(x), ghost.eval()(x))
        other.train()(x)
        ghost.load_state_dict(other.state_dict())
        torch.testing.assert_close(other.eval()(x), ghost.eval()(x))


def test_a_batch_that_is_not_split_equals_batch_norm():
    for num_dims, (shape, _) in BATCHES.items():
        ghost, theirs = shaken("ghost", 5, num_dims), TORCH[num_dims](5)
        theirs.load_state_dict(ghost.state_dict())
        x = scattered(shape)
        torch.testing.assert_close(ghost(x), theirs(x))
        torch.testing.assert_close(ghost.state_dict(), theirs.state_dict())
        assert ghost(x[:0]).shape == (0, *shape[1:])


def test_virtual_batches_of_one_sample_are_instance_normalization():
    x = scattered((3, 5, 4, 2))
    ghost = GhostBatchNorm(5, 4, virtual_batch_size=1)
    torch.testing.assert_close(ghost(x), F.instance_norm(x))


def test_without_running_statistics_eval_mode_splits_the_batch_too():
    x = scattered((9, 5))
    ghost = GhostBatchNorm(5, 2, 4, track_running_stats=False)
    expected = torch.cat([F.batch_norm(p, None, None, training=True) for p in x.split([4, 5])])
    for mode in (True, False):
        torch.testing.assert_close(ghost.train(mode)(x), expected)


@pytest.mark.parametrize(
    ("num_dims", "size", "least"),
    [(4, 0, 1), (4, 2.5, 1), (4, "8", 1), (2, 1, 2), (None, -1, 1)],
)
def test_an_invalid_size_is_refused(num_dims, size, least):
    with pytest.raises(UserError, match=rf"virtual_batch_size is {size!r};.* at least {least}, "):
        GhostBatchNorm(5, num_dims, size)


def test_single_values_and_other_shapes_are_rejected():
    ghost = GhostBatchNorm(5, 2, 4)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ghost(torch.ones(1, 5))
    # No virtual batch is smaller than its size, so none is merged.
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        GhostBatchNorm(5, None, 1)(torch.ones(4, 5))
    for mode in (True, False):
        with pytest.raises(ValueError, match="Expected 2-dimensional input"):
            ghost.train(mode)(torch.ones(9, 5, 2))


def test_synchronized_statistics_are_refused():
    network = nn.Sequential(GhostBatchNorm(5))
    with pytest.raises(UserError, match="a GhostBatchNorm, does not support sync_batchnorm"):
        LayerSync().synchronize(network, "cpu")
    assert recognition.only_writes_running_stats(network)
