"""Batch normalization from scratch, a drop-in for torch's BatchNorm1d, 2d and 3d.

`definition.py` says what is computed, and `fast.py` computes the same in less time and over several
processes. `batch_norm` and `BatchNorm` check the arguments and choose between the two.
"""

from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad

from bn_lightning.norms import definition, fast
from bn_lightning.norms.definition import at_least_float32, values_per_channel


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Normalize, scale and shift each channel of the input: algorithms 1 and 2 of the paper.

    The arguments are those of `torch.nn.functional.batch_norm`. With `training`, mean and variance
    are those of the batch (algorithm 1, the variance divided by m), and the running statistics, if
    given, move towards them in place by `momentum` (algorithm 2, step 10, the variance corrected by
    m / (m - 1)). Without `training`, the running statistics are used.

    Args:
        input: (N, C) or (N, C, ...), floating point. Arithmetic is in float32 at least, and the
            result has the input's dtype and memory format.
        running_mean, running_var, weight (gamma), bias (beta): (C,) each, or None; of the input's
            dtype, or float32 if that has 16 bits.
        momentum: the weight of the batch in the running statistics.
        process_group: take the statistics in training over the batches of all its processes.

    Raises:
        ValueError: input, running statistics or parameters of another shape or dtype; missing
            running statistics; or one value per channel in training, whose variance is always 0.
    """
    if input.dim() == 1 and not input.numel():
        return input.clone()  # There is nothing to normalize, and torch accepts it too.
    check_input(input, running_mean, running_var, training, eps, weight, bias)
    if training and process_group is None and values_per_channel(input) == 1:
        raise ValueError(
            "expected more than 1 value per channel in training, "
            f"got input of shape {tuple(input.shape)}"
        )
    by_definition = _must_follow_the_definition()

    if not training:
        assert running_mean is not None and running_var is not None  # checked by check_input
        normalize = fast.normalize_with_running_stats
        if by_definition:
            normalize = definition.normalize_with_running_stats
        return normalize(input, running_mean, running_var, weight, bias, eps).to(input.dtype)

    if by_definition and process_group is None:
        y, mean, var = definition.normalize_batch(at_least_float32(input), weight, bias, eps)
    else:
        y, mean, var = fast.FastBatchNorm.apply(input, weight, bias, eps, process_group)
    if running_mean is None or running_var is None:
        return y.to(input.dtype)
    # With a process group, an empty share has the statistics of the whole batch.
    if input.numel() or process_group is not None:
        definition.update_running_stats(running_mean, running_var, mean, var, momentum)
    return y.to(input.dtype)


def check_input(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    *parameters: Tensor | None,
) -> None:
    """Raise a ValueError for what a batch normalization cannot work with: see `batch_norm`."""
    if not input.is_floating_point():
        raise ValueError(f"expected floating-point input, got {input.dtype}")
    if input.dim() < 2:
        raise ValueError(
            f"expected input of two dimensions (N, C) or more, got shape {tuple(input.shape)}"
        )
    channels, dtype = input.size(1), input.dtype
    for given in (running_mean, running_var, *parameters):
        if given is None:
            continue
        if given.numel() != channels:
            raise ValueError(
                f"expected {given.numel()} channels in dimension 1, got shape {tuple(input.shape)}"
            )
        if given.dtype != dtype and (given.dtype != torch.float32 or dtype.itemsize != 2):
            raise ValueError(
                f"expected {given.dtype} input, the dtype of parameters and statistics, got {dtype}"
            )
    if (running_mean is None) != (running_var is None):
        raise ValueError("expected running_mean and running_var both or neither, got one of them")
    if running_mean is None and not training:
        raise ValueError(
            "expected running_mean and running_var, got None: "
            "they are needed where training is False"
        )
    if training and eps <= 0:
        raise ValueError(f"expected eps above 0 in training, got {eps}")


def _must_follow_the_definition() -> bool:
    """Return whether something has to see the single operations.

    Compilers fuse them. Forward-mode derivatives and torch.func derive or transform each of them.
    """
    # The last two names are private to torch, which has no public ones for the question.
    return (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    )


class BatchNorm(nn.Module):
    """Batch normalization over a batch of any rank.

    The input is (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W). Arguments, attributes,
    state-dict keys, train and eval mode are those of `torch.nn.BatchNorm2d`, so that a checkpoint
    of one loads into the other. The class does not inherit from torch's class: converters that look
    for that class, such as `torch.nn.SyncBatchNorm.convert_sync_batchnorm`, would silently replace
    the layer by torch's own.

    Args:
        num_features: the number of channels C.
        eps: added to the variance.
        momentum: the weight of the newest batch in the running statistics; None averages all
            batches alike.
        affine: learn gamma (`weight`, starts at 1) and beta (`bias`, starts at 0).
        track_running_stats: keep running statistics for eval mode; without them it uses the batch's
            own.
        bias: learn beta; without effect when `affine` is False.
        num_dims: when given, the rank that the input must have (2 behind a linear layer, 4 behind a
            convolution).

    Attributes:
        sync_batchnorm: take the statistics in training over the batches of all processes of the
            default group. Set by `Trainer(sync_batchnorm=True)` with the plugin of `sync.py`.
        prefers_channels_last: True: on a CPU the layer is faster in channels-last order.
        only_writes_running_stats: True: in training the layer writes its running statistics and
            never reads them. For both declarations see `recognition.py`.
    """

    prefers_channels_last: ClassVar[bool] = True
    only_writes_running_stats: ClassVar[bool] = True

    _version = 2  # of the state dict, as torch counts it
    sync_batchnorm: bool
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    num_batches_tracked: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        num_dims: int | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.num_dims = num_dims
        self.sync_batchnorm = False
        size = (num_features,)
        gamma = nn.Parameter(torch.ones(size, device=device, dtype=dtype)) if affine else None
        beta = None
        if affine and bias:
            beta = nn.Parameter(torch.zeros(size, device=device, dtype=dtype))
        self.register_parameter("weight", gamma)
        self.register_parameter("bias", beta)
        mean = var = count = None
        if track_running_stats:
            mean = torch.zeros(size, device=device, dtype=dtype)
            var = torch.ones(size, device=device, dtype=dtype)
            count = torch.tensor(0, device=device, dtype=torch.long)
        self.register_buffer("running_mean", mean)
        self.register_buffer("running_var", var)
        self.register_buffer("num_batches_tracked", count)

    def reset_running_stats(self) -> None:
        """Set the running statistics to those of a fresh layer."""
        mean, var, count = self.running_mean, self.running_var, self.num_batches_tracked
        if mean is not None and var is not None and count is not None:
            mean.zero_()
            var.fill_(1)
            count.zero_()

    def reset_parameters(self) -> None:
        """Set parameters and running statistics to those of a fresh layer."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input`, of a shape that the class names.

        Raises:
            ValueError: input of another rank than `num_dims`, or what `batch_norm` refuses.
        """
        if self.num_dims is not None and input.dim() != self.num_dims:
            raise ValueError(
                f"expected {self.num_dims}-d input, got {input.dim()}-d: {tuple(input.shape)}"
            )
        momentum: float | Tensor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None and self.running_mean is not None:
                momentum = 1 / self.num_batches_tracked.to(self.running_mean.dtype)
        # Without track_running_stats there may still be buffers, which training leaves alone.
        tracks = self.track_running_stats or not self.training
        syncs = self.sync_batchnorm and self.training
        spans = syncs and dist.is_available() and dist.is_initialized()
        return batch_norm(
            input,
            self.running_mean if tracks else None,
            self.running_var if tracks else None,
            self.weight,
            self.bias,
            self.training or self.running_mean is None,
            momentum,
            self.eps,
            process_group=dist.group.WORLD if spans else None,
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Layers saved before torch 0.4.1 did not count their batches.
        version = args[0].get("version")
        if (version is None or version < 2) and self.num_batches_tracked is not None:
            state_dict.setdefault(prefix + "num_batches_tracked", self.num_batches_tracked)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"bias={self.bias is not None}, track_running_stats={self.track_running_stats}"
        )
