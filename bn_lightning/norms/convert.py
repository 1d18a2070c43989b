"""Between torch's batch normalization and the one from scratch: the same parameters and buffers, the other class.

For what looks for torch's class, which the layer from scratch is not, on purpose: `torch.optim.swa_utils.update_bn`,
folding a norm into the layer before it, `torch.func.replace_all_batch_norm_modules_` and others.
"""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.norms.layer import BatchNorm

TORCH: dict[int | None, type[_BatchNorm]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}


def to_torch(network: nn.Module) -> nn.Module:
    """Make each `BatchNorm` of the network torch's BatchNorm1d, 2d or 3d, in place, and give the network back.

    The layers stay the same objects, with their parameters, buffers and hooks: only their class changes.

    Raises:
        ValueError: for a `BatchNorm` without `num_dims`; torch has a class for each rank. Nothing is changed then.
    """
    layers = [module for module in network.modules() if isinstance(module, BatchNorm)]
    for layer in layers:
        if layer.num_dims not in TORCH:
            raise ValueError(
                f"{layer} does not say which of torch's layers it stands for; give it num_dims, 2 to 5"
            )
    for layer in layers:
        layer.__class__ = TORCH[layer.num_dims]  # type: ignore[assignment]
    return network


def from_torch(network: nn.Module) -> nn.Module:
    """Make each BatchNorm1d, 2d and 3d of the network a `BatchNorm`, in place, and give the network back."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            num_dims = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}.get(
                type(module)
            )  # BatchNorm1d takes input of two ranks
            module.__dict__.update(num_dims=num_dims, sync_batchnorm=False)
            module.__class__ = BatchNorm  # type: ignore[assignment]
    return network
