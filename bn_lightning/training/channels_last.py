"""Convolutions in channels-last order, with contiguous weights."""

from typing import Any

import torch
from torch import Tensor, nn


def use_channels_last(network: nn.Module) -> None:
    """Make the two-dimensional convolutions of a network compute in channels-last order.

    Their inputs are converted, and the output of a convolution has the order of its
    input. `network.to(memory_format=torch.channels_last)` would convert the weights
    instead, and with them the gradients. But optimizers such as LBFGS, and functions
    such as `parameters_to_vector`, view a weight or a gradient as a vector, which only
    a contiguous tensor allows.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_pre_hook(_convert)
            # An input with one channel is in both orders, and so is the weight. Then
            # PyTorch computes in the order that the strides of the weight suggest.
            weight = module.weight
            if weight.is_contiguous(memory_format=torch.channels_last):
                weight.data = weight.data.to(memory_format=torch.channels_last)


def _convert(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        x.contiguous(memory_format=torch.channels_last)
        if isinstance(x, Tensor) and x.dim() == 4
        else x
        for x in args
    )
