"""Where each norm layer keeps its values."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from bn_lightning.norms import article
from bn_lightning.norms.renorm import BatchRenorm


@dataclass(frozen=True)
class Names:
    """Where a norm layer keeps its values. The defaults are PyTorch's names.

    Attributes:
        weight, bias: names of gamma and beta.
        mean, var: names of the running statistics.
        var_is_std: whether `var` is sqrt(variance + eps), a standard deviation.
        momentum_is_of_old: whether momentum is the weight of the old running statistics.
        plain: values of attributes with which the layer, in training mode, normalizes by
            the statistics of the batch alone.
    """

    weight: str = "weight"
    bias: str = "bias"
    mean: str = "running_mean"
    var: str = "running_var"
    var_is_std: bool = False
    momentum_is_of_old: bool = False
    plain: Mapping[str, Any] = field(default_factory=dict)


NAMES: dict[Callable[..., nn.Module], Names] = {
    article.BatchNorm: Names("gamma", "beta", "moving_mean", "moving_var", momentum_is_of_old=True),
    BatchRenorm: Names(var="running_std", var_is_std=True, plain={"r_max": 1.0, "d_max": 0.0}),
}


def names_of(layer: nn.Module) -> Names:
    """Return where a layer keeps its values."""
    return next((NAMES[cls] for cls in type(layer).__mro__ if cls in NAMES), Names())
