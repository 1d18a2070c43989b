"""Training and eval mode of the modules of a network."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def restored(network: nn.Module) -> Iterator[None]:
    """Restore the mode of each module of a network at the end."""
    modes = {module: module.training for module in network.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def in_eval_mode(network: nn.Module) -> Iterator[None]:
    """Set a network to eval mode, and restore the mode of each of its modules at the end.

    The modes are set as attributes. A module whose `train` or `eval` does more, such as
    merging low-rank weights, would not be restored.
    """
    with restored(network):
        for module in network.modules():
            module.training = False
        yield
