"""RMS normalization, compared with its definition."""

import pytest
import torch
from torch import nn

from bn_lightning.norms import registry
from tests.support.new_norms import assert_rounded_once, output_and_gradients, per_channel, shaken
from tests.support.norm_batches import LAYOUTS, SHAPES, scattered


def definition(x, weight, eps):
    """Zhang and Sennrich 2019, equation 4, at each position."""
    rms = (x.square().mean(1, keepdim=True) + eps).sqrt()
    return x / rms * per_channel(weight, x)


@pytest.mark.parametrize("num_dims", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_each_position_is_divided_by_its_root_mean_square(num_dims, dtype, tolerance):
    layer = shaken("rms", 5, num_dims, dtype, eps=0.1)
    for layout in LAYOUTS.values() if num_dims > 2 else (torch.clone,):
        x = layout(scattered(SHAPES[num_dims], dtype))
        truth = output_and_gradients(
            lambda x: definition(x, layer.weight, 0.1), x.contiguous(), layer.weight
        )
        for mode in (True, False):
            ours = output_and_gradients(layer.train(mode), x, layer.weight)
            scale = max(t.abs().max().item() for t in truth)
            torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("num_dims", SHAPES)
def test_half_precision_input_is_computed_in_float32(num_dims):
    layer = shaken("rms", 5, num_dims)
    for dtype in (torch.bfloat16, torch.float16):
        x = scattered(SHAPES[num_dims], dtype)
        y = layer(x)
        assert y.dtype == dtype
        assert_rounded_once(y, definition(x.double(), layer.weight.double(), 1e-5))


def test_the_squares_of_large_float16_values_do_not_overflow():
    x = torch.full((2, 5, 3, 4), 6e4, dtype=torch.float16)
    layer = registry.make("rms", 5, 4).half()
    torch.testing.assert_close(layer(x), torch.ones_like(x))


def test_the_layer_behind_a_linear_layer_is_pytorchs_and_has_the_same_state():
    behind_linear, behind_convolution = (shaken("rms", 5, dims) for dims in (2, 4))
    assert type(behind_linear) is nn.RMSNorm and behind_linear.eps == 1e-5
    behind_convolution.load_state_dict(behind_linear.state_dict())
    x = scattered((8, 5))
    y = behind_convolution(x[:, :, None, None])
    torch.testing.assert_close(y[:, :, 0, 0], behind_linear(x))
    assert registry.make("rms", 5, 4, {"affine": False}).weight is None


def test_the_memory_format_of_the_input_is_kept():
    for num_dims, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        x, layer = scattered(SHAPES[num_dims]), shaken("rms", 5, num_dims)
        assert layer(x).is_contiguous()
        last = x.to(memory_format=layout)
        assert layer(last).is_contiguous(memory_format=layout)


def test_input_of_another_shape_is_rejected():
    layer = registry.make("rms", 5, 4)
    with pytest.raises(ValueError, match="Expected 4-dimensional input, got 3"):
        layer(scattered(SHAPES[3]))
    with pytest.raises(RuntimeError, match=r"\[5\]|\[\*, 5\]"):
        layer(torch.ones(2, 6, 3, 4))
