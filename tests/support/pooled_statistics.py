"""The statistics of all values that reach the norm layers of a network, by plain recomputation."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from bn_lightning.norms.renorm import BatchRenorm


def buffers_of(layer):
    """Return the running mean and the running variance or deviation of a layer, or None."""
    buffers = dict(layer.named_buffers(recurse=False))
    mean = buffers.get("running_mean", buffers.get("moving_mean"))
    names = ("running_var", "moving_var", "running_std")
    return None if mean is None else (mean, next(buffers[n] for n in names if n in buffers))


def norms_of(network):
    """Return the layers with running statistics by name."""
    return {name: layer for name, layer in network.named_modules() if buffers_of(layer)}


def pooled_inputs(network, batches, names=None):
    """Return a list of the inputs of each norm layer, (m, C) each, in float64.

    A copy of the network is called. The layers with these names, by default all norm
    layers, normalize by the statistics of the batch. The others are in eval mode.
    """
    network = copy.deepcopy(network).eval()
    layers = norms_of(network) if names is None else {n: network.get_submodule(n) for n in names}
    inputs = {name: [] for name in layers}

    def note(name):
        def hook(layer, args, output):
            inputs[name].append(args[0].detach().double().movedim(1, -1).flatten(0, -2))
            # The statistics are those of batch normalization, without r and d.
            if isinstance(layer, BatchRenorm):
                gamma, beta = layer.weight, layer.bias
                return F.batch_norm(args[0], None, None, gamma, beta, training=True, eps=layer.eps)
            return None

        return hook

    for name, layer in layers.items():
        layer.training = True
        layer.register_forward_hook(note(name))
    # The layer of the article has the mode of the gradients.
    with torch.enable_grad():
        for batch in batches:
            network(batch)
    return inputs


def pooled_statistics(network, batches, names=None):
    """Return the mean and the unbiased variance of all inputs of each layer, (C,) each."""
    pooled = {n: torch.cat(x) for n, x in pooled_inputs(network, batches, names).items()}
    return {n: (torch.mean(x, 0), torch.var(x, 0, unbiased=True)) for n, x in pooled.items()}


def assert_statistics(network, expected, rtol=1e-9, atol=1e-9):
    """Assert that layers have these statistics, given as from `pooled_statistics`."""
    for name, (mean, var) in expected.items():
        layer = network.get_submodule(name)
        running_mean, running_var = (value.detach().double() for value in buffers_of(layer))
        if hasattr(layer, "running_std"):
            running_var = running_var**2 - layer.eps
        tolerance = {"rtol": rtol, "atol": atol}
        torch.testing.assert_close(running_mean.flatten(), mean, **tolerance, msg=name)
        torch.testing.assert_close(running_var.flatten(), var, **tolerance, msg=name)


def randomized(network):
    """Give the norm layers of a network random parameters and running statistics."""
    for layer in network.modules():
        if not buffers_of(layer) and not isinstance(layer, nn.GroupNorm):
            continue
        for name, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers()):
            if name in ("bias", "beta") or "mean" in name:
                tensor.data.normal_()
            elif tensor.is_floating_point():
                tensor.data.uniform_(0.5, 1.5)
    return network
