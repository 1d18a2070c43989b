"""Layers with random parameters and statistics, for tests of norms."""

import torch

from bn_lightning.norms import registry


def shaken(name, num_features, num_dims, dtype=torch.float32, seed=0, **options):
    """Return a registered norm with other parameters and statistics in each channel."""
    layer = registry.make(name, num_features, num_dims, options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5, generator=generator)
    return layer.to(dtype)


def per_channel(values, x):
    return values.view(-1, *[1] * (x.dim() - 2))


def assert_rounded_once(y, exact):
    """Check that y, of 16 bits, differs from the exact result by its own rounding only."""
    rtol = torch.finfo(y.dtype).eps / 2 * 1.02
    torch.testing.assert_close(y.double(), exact, rtol=rtol, atol=2e-5)


def output_and_gradients(function, x, *parameters):
    """Return the output, and the gradients with respect to x and the parameters.

    The loss gives each value of the output another weight.
    """
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = function(leaf)
    factors = torch.linspace(0, 1, y.numel(), dtype=y.dtype).view_as(y)
    loss = (y.square() * factors).sum()
    return [y, *torch.autograd.grad(loss, (leaf, *parameters))]
