import pytest
from torch import nn

from bn_lightning import UserError
from bn_lightning.norms import torch_norms


def test_builtin_passes_its_arguments_on():
    layer = torch_norms.builtin(6, 4, 1e-3, None, False, False)
    assert type(layer) is nn.BatchNorm2d
    assert (layer.eps, layer.momentum, layer.weight, layer.running_mean) == (1e-3, None, None, None)


@pytest.mark.parametrize(("num_dims", "num_groups"), [(4, 0), (4, 4), (2, 6)])
def test_groups_that_cannot_be_are_refused_with_those_that_can(num_dims, num_groups):
    with pytest.raises(UserError, match="must be one of 1, 2, 3"):
        torch_norms.group(6, num_dims, num_groups)


def test_groups_of_one_channel_are_allowed_behind_a_convolution():
    assert torch_norms.group(6, 4, 6).num_groups == 6
