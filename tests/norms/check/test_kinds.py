"""The kind of a layer, which is found from what it does."""

import pytest
from torch import nn
from torch.nn import functional as F

from bn_lightning.norms.check import acceptance, determination
from bn_lightning.norms.check.examination import prepare
from bn_lightning.norms.check.subject import Builder
from tests.support.correct_norms import LAYERS
from tests.support.planted_bugs import NO_BUGS

RUNNING = "with running statistics"
NO_RUNNING = "without running statistics"


def wrap(build):
    """Return a norm that ignores the number of dimensions."""
    return lambda num_features, num_dims: build(num_features)


def description(norm, num_dims):
    build = Builder(norm, "norm", {})
    return str(determination.determine(build, acceptance.accepted(build, num_dims)))


@pytest.mark.parametrize(
    ("norm", "num_dims", "expected"),
    [
        (
            wrap(nn.BatchNorm3d),
            5,
            f"statistics over samples, depth, height, width for each channel; centring; {RUNNING}",
        ),
        (
            wrap(lambda c: nn.BatchNorm1d(c, track_running_stats=False)),
            3,
            f"statistics over samples, positions for each channel; centring; {NO_RUNNING}",
        ),
        (
            wrap(lambda c: nn.GroupNorm(3, c)),
            4,
            "statistics over 3 groups of channels, height, width for each sample; centring; "
            + NO_RUNNING,
        ),
        (
            wrap(nn.LayerNorm),
            2,
            f"statistics over channels for each sample; centring; {NO_RUNNING}",
        ),
        (
            wrap(nn.RMSNorm),
            2,
            "statistics over channels for each sample; not centring (root mean square); "
            + NO_RUNNING,
        ),
        (
            wrap(lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True)),
            4,
            f"statistics over height, width for each sample and channel; centring; {RUNNING}",
        ),
        (LAYERS["ghost_8"], 2, None),
        (LAYERS["frozen"], 4, "fixed scale and shift for each channel"),
        (LAYERS["batch_renorm"], 3, None),
        (LAYERS["batch_renorm_with_warmup"], 3, None),
        (LAYERS["weight_standardized_conv"], 4, None),
    ],
)
def test_the_kind_is_found(norm, num_dims, expected):
    found = description(norm, num_dims)
    if expected is not None:
        assert found == expected


def test_virtual_batches_are_counted():
    assert "virtual batches of 8 samples" in description(LAYERS["ghost_8"], 2)


@pytest.mark.parametrize("name", ["batch_renorm", "always_moving_rms"])
def test_a_layer_that_reads_running_statistics_in_training_is_told_apart(name):
    assert "corrected by running statistics in training" in description(LAYERS[name], 4)


def test_a_layer_with_a_convolution_has_no_formula():
    assert "other operations" in description(LAYERS["weight_standardized_conv"], 4)


def test_an_eps_that_no_attribute_states_is_found():
    class Hidden(nn.Module):
        def forward(self, x):
            return F.layer_norm(x, x.shape[1:], eps=0.0123)

    build = Builder(wrap(lambda c: Hidden()), "norm", {})
    kind = determination.determine(build, acceptance.accepted(build, 4))
    assert kind.fit.eps == pytest.approx(0.0123, rel=1e-2)


def test_a_layer_for_the_last_dimension_is_examined_where_it_fits():
    """It accepts (N, C, L) only if L happens to be C."""
    norm = prepare(LAYERS["llama_rms_norm"], "llama")
    assert (list(norm.kinds), list(norm.rejected)) == ([2], [3, 4, 5])
    assert not norm.required
    assert list(prepare(NO_BUGS["channels_last_dim"], "last").kinds) == [2]


@pytest.mark.parametrize(
    ("build", "name"), [(nn.Identity, "identity"), (lambda c: nn.Dropout(0.0), "dropout")]
)
def test_a_layer_that_does_not_normalize_has_no_statistics(build, name):
    kind = prepare(wrap(build), name, num_dims=[2]).kinds[2]
    assert not kind.has_groups
    assert str(kind) == "fixed scale and shift for each channel"
