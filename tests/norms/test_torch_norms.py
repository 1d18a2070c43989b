"""PyTorch's layers as norms: their arguments, and the groups that GroupNorm accepts."""

import pytest
from torch import nn

from bn_lightning import UserError
from bn_lightning.norms import torch_norms


def test_builtin_passes_its_arguments_to_pytorchs_layer():
    layer = torch_norms.builtin(6, 4, 1e-3, None, False, False)
    assert type(layer) is nn.BatchNorm2d
    assert (layer.eps, layer.momentum, layer.weight, layer.running_mean) == (1e-3, None, None, None)


@pytest.mark.parametrize(("num_dims", "num_groups"), [(4, 0), (4, 4), (2, 6)])
def test_an_impossible_number_of_groups_is_rejected_with_the_possible_ones(num_dims, num_groups):
    with pytest.raises(UserError, match="must be one of 1, 2, 3"):
        torch_norms.group(6, num_dims, num_groups)


def test_groups_of_one_channel_are_allowed_after_a_convolution():
    assert torch_norms.group(6, 4, 6).num_groups == 6
