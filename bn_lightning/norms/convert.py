"""Conversion between PyTorch's batch normalization layers and the one from scratch.

The two have the same parameters and buffers, so the layers stay the same objects and
change their class. Subclasses are left unchanged, because they may do more. Some tools
accept only PyTorch's class, from which `BatchNorm` does not inherit: for example,
`torch.optim.swa_utils.update_bn`, `torch.func.replace_all_batch_norm_modules_`, and
tools that fold a norm into the preceding layer.
"""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.norms.layer import BatchNorm

# PyTorch's class for each value of `BatchNorm.num_dims`.
TORCH: dict[int | None, type[_BatchNorm]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}


def to_torch(network: nn.Module) -> nn.Module:
    """Convert each `BatchNorm` of a network to BatchNorm1d, 2d or 3d, in place. Return the network.

    The layers stay the same objects, with the same parameters, buffers and hooks.

    Raises:
        ValueError: a `BatchNorm` has no `num_dims` from 2 to 5, so that PyTorch's class
            for it is unknown. The network is then unchanged.
    """
    layers = [module for module in network.modules() if type(module) is BatchNorm]
    for layer in layers:
        if layer.num_dims not in TORCH:
            raise ValueError(
                f"Cannot convert {layer}: its num_dims is {layer.num_dims}.\n"
                "PyTorch has one class for each number of dimensions. "
                "Create the layer with num_dims from 2 to 5."
            )
    for layer in layers:
        layer.__class__ = TORCH[layer.num_dims]  # type: ignore[assignment]
    return network


def from_torch(network: nn.Module) -> nn.Module:
    """Convert each BatchNorm1d, 2d and 3d of a network to `BatchNorm`, in place.

    Return the network.
    """
    # BatchNorm1d accepts 2 or 3 dimensions.
    num_dims: dict[type[nn.Module], int | None]
    num_dims = {nn.BatchNorm1d: None, nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}
    for module in network.modules():
        if type(module) in num_dims:
            module.__dict__.update(num_dims=num_dims[type(module)], sync_batchnorm=False)
            module.__class__ = BatchNorm
    return network
