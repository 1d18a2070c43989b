"""Batch normalization from scratch, a drop-in replacement for PyTorch's BatchNorm1d, 2d and 3d.

Read `definition.py` first. It defines the result. `fast.py` computes the same result
faster, and also across processes. The function `batch_norm` checks its arguments and
calls one of the two. The layer `BatchNorm` keeps the parameters and the running
statistics, and calls the function.
"""

from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bn_lightning.norms import definition, fast
from bn_lightning.norms.definition import at_least_float32, values_per_channel
from bn_lightning.norms.memory_order import MemoryOrder


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

    The arguments are those of `torch.nn.functional.batch_norm`.

    * If `training` is True, the batch is normalized by its own mean and variance (algorithm 1). The
      running statistics, if given, are updated in place (algorithm 2, step 10).
    * If `training` is False, the batch is normalized by the running statistics (step 11).

    With m values per channel, the batch is normalized by its biased variance (divisor
    m). The running variance is updated with the unbiased variance (divisor m - 1).

    Args:
        input: (N, C) or (N, C, ...), floating point. 16-bit input is normalized in
            float32. The result has the input's dtype and memory format.
        running_mean, running_var, weight, bias: (C,) each, or None. Their dtype is that
            of the input. With 16-bit input, it may also be float32. `weight` is gamma,
            and `bias` is beta.
        momentum: the weight of the current batch in the running statistics.
        process_group: in training, compute the statistics over the batches of all its
            processes.

    Raises:
        ValueError: a shape or dtype does not fit; the running statistics are missing in
            eval mode; or, in training, eps is not positive, or each channel has only
            one value, so that its variance is 0.
    """
    if input.dim() == 1 and not input.numel():
        # There is nothing to normalize. PyTorch's function accepts this input too.
        return input.clone()
    check_input(input, running_mean, running_var, training, eps, weight, bias)
    if training and process_group is None and values_per_channel(input) == 1:
        raise ValueError(
            "Expected more than 1 value per channel in training, "
            f"got input of shape {tuple(input.shape)}."
        )
    use_definition = fast.needs_plain_operations()

    if not training:
        assert running_mean is not None and running_var is not None  # see check_input
        statistics = (running_mean, running_var)
        if use_definition:
            y = definition.normalize_with_running_stats(input, *statistics, weight, bias, eps)
            return _like_pytorchs_output(y, input)
        return fast.normalize_with_running_stats(input, *statistics, weight, bias, eps)

    track = None
    # With a process group, the statistics are defined even if this process's shard is
    # empty.
    has_values = input.numel() > 0 or process_group is not None
    if running_mean is not None and running_var is not None and has_values:
        track = partial(
            definition.update_running_stats, running_mean, running_var, momentum=momentum
        )
    if process_group is not None or not use_definition:
        return fast.normalize_batch(input, weight, bias, eps, process_group, track)
    y, mean, var = definition.normalize_batch(at_least_float32(input), weight, bias, eps)
    if track is not None:
        track(mean, var)
    return _like_pytorchs_output(y, input)


def _like_pytorchs_output(y: Tensor, input: Tensor) -> Tensor:
    """Return y in the dtype and memory format of the output of PyTorch's layer."""
    y = y.to(input.dtype)
    return y if MemoryOrder.of(input).width else y.contiguous()


def check_input(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    *parameters: Tensor | None,
) -> None:
    """Check the arguments of a batch normalization.

    Raises:
        ValueError: see `batch_norm`.
    """
    shape, dtype = tuple(input.shape), input.dtype
    if not input.is_floating_point():
        raise ValueError(f"Expected floating-point input, got {dtype}.")
    if input.dim() < 2:
        raise ValueError(f"Expected input with two or more dimensions (N, C, ...), got {shape}.")
    channels = input.size(1)
    for given in (running_mean, running_var, *parameters):
        if given is None:
            continue
        if given.numel() != channels:
            raise ValueError(
                f"Expected {given.numel()} channels in dimension 1, got input of shape {shape}."
            )
        if given.dtype != dtype and (given.dtype != torch.float32 or dtype.itemsize != 2):
            raise ValueError(
                f"Expected {given.dtype} input, the dtype of the parameters and running "
                f"statistics, got {dtype}."
            )
    if (running_mean is None) != (running_var is None):
        raise ValueError("Expected both running_mean and running_var or neither, got one of them.")
    if running_mean is None and not training:
        raise ValueError(
            "Expected running_mean and running_var, got None. They are required if training "
            "is False."
        )
    if training and eps <= 0:
        raise ValueError(f"Expected eps greater than 0 in training, got {eps}.")


def check_num_dims(input: Tensor, num_dims: int | None) -> None:
    """Check the number of dimensions of an input. None allows any.

    Raises:
        ValueError: the input has another number of dimensions.
    """
    if num_dims is not None and input.dim() != num_dims:
        raise ValueError(
            f"Expected {num_dims}-dimensional input, "
            f"got {input.dim()} dimensions: {tuple(input.shape)}."
        )


class BatchNorm(nn.Module):
    """Batch normalization of input with two or more dimensions.

    The input is (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W). Arguments,
    attributes, state-dict keys and modes are those of `torch.nn.BatchNorm2d`, so each
    can load the checkpoints of the other.

    The class does not inherit from PyTorch's. Converters such as
    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` look for PyTorch's class, and would
    silently replace this layer by PyTorch's own.

    Args:
        num_features: the number of channels C.
        eps: added to the variance.
        momentum: the weight of the newest batch in the running statistics. None gives
            all batches the same weight.
        affine: learn gamma (`weight`, starts at 1) and beta (`bias`, starts at 0).
        track_running_stats: keep running statistics for eval mode. Without them, eval
            mode uses the statistics of the batch, as training does.
        bias: learn beta. Has no effect if `affine` is False.
        num_dims: if given, the number of dimensions that the input must have: 2 after a
            linear layer, 4 after a convolution.

    Attributes:
        sync_batchnorm: in training, compute the statistics over the batches of all
            processes of the default group. `Trainer(sync_batchnorm=True)` sets it with
            the plugin in `sync.py`.
        prefers_channels_last: True. On a CPU, the layer is faster in channels-last
            format. See `recognition.py`.
        only_writes_running_stats: True. In training, the layer writes its running
            statistics but never reads them. See `recognition.py`.
    """

    prefers_channels_last: ClassVar[bool] = True
    only_writes_running_stats: ClassVar[bool] = True

    # The version of the state dict, equal to that of PyTorch's BatchNorm.
    _version = 2
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
        """Reset the running statistics to their initial values."""
        mean, var, count = self.running_mean, self.running_var, self.num_batches_tracked
        if mean is not None and var is not None and count is not None:
            mean.zero_()
            var.fill_(1)
            count.zero_()

    def reset_parameters(self) -> None:
        """Reset the parameters and the running statistics to their initial values."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input`, (N, C) or (N, C, ...).

        Raises:
            ValueError: the input does not have `num_dims` dimensions, or see
                `batch_norm`.
        """
        check_num_dims(input, self.num_dims)
        momentum: float | Tensor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None and self.running_mean is not None:
                # 16 bits could not represent the count.
                dtype = torch.promote_types(self.running_mean.dtype, torch.float32)
                momentum = 1 / self.num_batches_tracked.to(dtype)

        use_batch_stats = self.training or self.running_mean is None
        # track_running_stats may be set to False later. Then the buffers are not
        # updated.
        pass_running_stats = self.track_running_stats or not self.training
        synchronize = self.sync_batchnorm and self.training
        synchronize = synchronize and dist.is_available() and dist.is_initialized()
        return batch_norm(
            input,
            self.running_mean if pass_running_stats else None,
            self.running_var if pass_running_stats else None,
            self.weight,
            self.bias,
            use_batch_stats,
            momentum,
            self.eps,
            process_group=dist.group.WORLD if synchronize else None,
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Layers saved before PyTorch 0.4.1 have no num_batches_tracked.
        version, count = args[0].get("version"), self.num_batches_tracked
        if (version is None or version < 2) and count is not None:
            count = torch.tensor(0) if count.is_meta else count
            state_dict.setdefault(prefix + "num_batches_tracked", count)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"bias={self.bias is not None}, track_running_stats={self.track_running_stats}"
        )
