"""Mutants that are correct layers, each with the reason.

Those of the second part were found among the survivors of `tests/benchmarks/mutants.py`.

A name contains the line in the file of the base. After a change of a base, the names change.
"""

BUFFERS = "Buffers have no gradient, so no_grad changes nothing."
NO_GRAD = "The statement is inside torch.no_grad() already."
TWICE = "The unbiased variance is detached before it is used."
CENTERED = (
    "The gradient of sum((x - mean)^2) with respect to the mean is -2 sum(x - mean) = 0. "
    "Only rounding differs."
)
EMPTY = (
    "m is never 1 here, because that raises an error. With m = 0 the quotient is NaN, but an empty "
    "batch has no output or gradient that uses it, and the running statistics are left as they are."
)
NEVER_NEGATIVE = "The number of values m is never negative."
COUNT = "The number of values m carries no gradient."
DTYPE = "All buffers of a layer have the same dtype and device, and `to` uses nothing else."
FLOAT_QUOTIENT = (
    "PyTorch divides by an integer tensor in float32. The quotient differs by rounding, about 1e-8."
)
OVER_CHANNELS = (
    "Layer normalization over the channels of each position, as in ConvNeXt, is correct too."
)
# Layers that are correct, but not those of the base.
FROZEN = "The parameter is not trained. Layers with frozen parameters are correct."
UNUSED = "The parameter is not used. Layers with unused parameters, or without gamma, are correct."
OWN_DTYPE = (
    "The layer computes in another precision than the base: in the dtype of its input, as "
    "layers of plain operations do, or always in float32."
)
EMPTY_BATCH = (
    "Only an empty batch, or one value per channel, shows it. A layer need not accept them."
)
BIASED = (
    "The running variance is biased, or so for two values. Without PyTorch's layer as the "
    "definition, both are correct."
)
ONE_VALUE = "Only one value per channel shows it, which PyTorch's layer rejects."
NO_MOMENTUM_NONE = "The layer raises for momentum=None. It need not accept it."
FROZEN_STATISTICS = "The statistics are never updated: this is frozen batch normalization."
SIGN_OF_BETA = "Beta is subtracted. Such a layer learns the same functions."
INITIAL_MEAN = "The initial running mean is forgotten by the training."

REASONS = {
    BUFFERS: [
        "batch_norm.detach.34:no_grad: mean, var = (self.running_mean.view(self.shape), "
        "self.running_var.view(self.shape))",
        "manual_batch_norm.detach.58:no_grad: mean, var = (self.running_mean.view(self.shape), "
        "self.running_var.view(self.shape))",
        "instance_norm.detach.28:no_grad: mean, var = (self.running_mean, self.running_var)",
    ],
    NO_GRAD: [
        "manual_batch_norm.detach.61:no_grad: mean, var = moments(x, self.axes)",
        "ghost_batch_norm.detach.35:var * m -> var.detach() * m",
        "ghost_batch_norm.detach.36:mean - self.running_mean -> mean.detach() - self.running_mean",
        "batch_renorm.detach.45:std / self.running_std -> std.detach() / self.running_std",
        "batch_renorm.detach.46:mean - self.running_mean -> mean.detach() - self.running_mean",
        "batch_renorm.detach.47:mean - self.running_mean -> mean.detach() - self.running_mean",
        "batch_renorm.detach.48:std - self.running_std -> std.detach() - self.running_std",
    ],
    TWICE: ["instance_norm.detach.33:var * m -> var.detach() * m"],
    CENTERED: [
        "batch_norm.detach.49:x - mean -> x - mean.detach()",
        "layer_norm.detach.20:x - mean -> x - mean.detach()",
        "group_norm.detach.22:groups - mean -> groups - mean.detach()",
        "ghost_batch_norm.detach.33:x - mean -> x - mean.detach()",
        "batch_renorm.detach.36:x - mean -> x - mean.detach()",
    ],
    EMPTY: [
        "batch_norm.call.48:m.clamp(min=1) -> m",
        "batch_norm.constant.48:1 -> 2",
        "batch_norm.constant.48:1 -> 0",
        "batch_norm.call.52:m.clamp(min=1) -> m",
        "batch_norm.constant.52:1 -> 2",
        "batch_norm.constant.52:1 -> 0",
        "manual_batch_norm.call.8:max(x.numel() // x.size(1), 1) -> x.numel() // x.size(1)",
        "manual_batch_norm.constant.8:1 -> 2'",
        "manual_batch_norm.constant.8:1 -> 0'",
        "manual_batch_norm.call.32:max(x.numel() // x.size(1), 1) -> x.numel() // x.size(1)",
        "manual_batch_norm.constant.32:1 -> 2'",
        "manual_batch_norm.constant.32:1 -> 0'",
    ],
    NEVER_NEGATIVE: [
        "batch_norm.condition.59:m == 0 -> m <= 0",
        "manual_batch_norm.condition.71:m == 0 -> m <= 0",
    ],
    COUNT: ["batch_norm.synchronization.44:all_reduce(m) -> m + (all_reduce(m) - m).detach()"],
    DTYPE: [
        "instance_norm.confuse.34:self.running_mean -> self.running_var'",
        "instance_norm.confuse.36:self.running_var -> self.running_mean",
    ],
    FLOAT_QUOTIENT: [
        "batch_norm.call.63:self.num_batches_tracked.item() -> self.num_batches_tracked",
        "manual_batch_norm.call.75:self.num_batches_tracked.item() -> self.num_batches_tracked",
        "batch_renorm.call.41:self.num_batches_tracked.item() -> self.num_batches_tracked",
    ],
    OVER_CHANNELS: [
        "layer_norm.axes.11:[1, *range(2, num_dims)] without *range(2, num_dims)",
    ],
    FROZEN: [
        "instance_norm.state.17:bias: buffer",
        "layer_norm.state.14:bias: buffer",
        "layer_norm.state.13:weight: buffer",
        "group_norm.state.16:bias: buffer",
        "instance_norm.state.16:nn.Parameter(torch.ones(shape)) -> nn.Parameter(torch.one"
        "s(shape), requires_grad=False)",
        "group_norm.state.15:weight: buffer",
        "ghost_batch_norm.state.16:nn.Parameter(torch.zeros(shape)) -> nn.Parameter(torch.zeros"
        "(shape), requires_grad=False)",
        "group_norm.state.15:nn.Parameter(torch.ones(num_features)) -> nn.Parameter(torch"
        ".ones(num_features), [...]",
        "instance_norm.state.16:weight: buffer",
        "rms_norm.state.11:weight: buffer",
        "instance_norm.state.17:nn.Parameter(torch.zeros(shape)) -> nn.Parameter(torch.ze"
        "ros(shape), requires_grad=False)",
    ],
    UNUSED: [
        "group_norm.arithmetic.24:x_hat * self.weight.view(self.shape) -> x_hat",
        "ghost_batch_norm.arithmetic.28:self.weight * x_hat -> x_hat",
        "rms_norm.arithmetic.18:self.weight * x -> x",
        "batch_renorm.arithmetic.32:self.weight * x_hat -> x_hat",
    ],
    OWN_DTYPE: [
        "rms_norm.condition.15:if dtype in (torch.float16, torch.bfloat16) -> if False",
        "ghost_batch_norm.call.22:x.to(torch.promote_types(dtype, torch.float32)) -> x",
        "group_norm.call.19:torch.promote_types(x.dtype, torch.float32) -> x.dtype",
        "rms_norm.call.16:x.float() -> x",
        "rms_norm.condition.15:if dtype in (torch.float16, torch.bfloat16) -> if True",
        "rms_norm.swap.13:swap if dtype in (torch.float16, torch.bfloat16): | mean_square"
        " = x.square().mean(1, keepdim=True)",
        "instance_norm.call.27:torch.promote_types(dtype, torch.float32) -> dtype",
        "ghost_batch_norm.delete.22:delete x = x.to(torch.promote_types(dtype, torch.float32))",
        "instance_norm.call.27:torch.promote_types(dtype, torch.float32) -> torch.float32",
        "instance_norm.delete.27:delete x = x.to(torch.promote_types(dtype, torch.float32))",
        "group_norm.call.19:torch.promote_types(x.dtype, torch.float32) -> torch.float32",
        "group_norm.call.19:x.to(torch.promote_types(x.dtype, torch.float32)) -> x",
        "layer_norm.dtype.18:torch.float32 -> torch.float16",
        "batch_renorm.call.27:torch.promote_types(dtype, torch.float32) -> torch.float32",
        "batch_renorm.swap.25:swap x = x.to(torch.promote_types(dtype, torch.float32)) | "
        "if self.training and len(x) > 0:",
        "instance_norm.call.27:x.to(torch.promote_types(dtype, torch.float32)) -> x",
        "layer_norm.call.18:torch.promote_types(dtype, torch.float32) -> dtype",
        "layer_norm.delete.18:delete x = x.to(torch.promote_types(dtype, torch.float32))",
    ],
    EMPTY_BATCH: [
        "batch_norm.constant.59:0 -> -1",
        "ghost_batch_norm.condition.23:len(x) > 0 -> len(x) >= 0",
        "batch_norm.condition.46:m == 1 -> m <= 1",
        "manual_batch_norm.condition.68:m == 1 -> m <= 1",
        "ghost_batch_norm.constant.23:0 -> -1",
        "batch_norm.constant.59:0 -> 1",
        "batch_norm.constant.46:1 -> 0",
        "instance_norm.condition.31:len(x) > 0 -> len(x) >= 0",
        "instance_norm.constant.31:0 -> -1",
        "batch_renorm.swap.25:swap x = x.to(torch.promote_types(dtype, torch.float32)) | "
        "if self.training and len(x) > 0:",
        "manual_batch_norm.condition.71:if m == 0 -> if False",
    ],
    BIASED: [
        "instance_norm.constant.33:1 -> 2'",
        "instance_norm.constant.33:1 -> 0",
        "ghost_batch_norm.constant.35:1 -> 2'",
        "ghost_batch_norm.arithmetic.35:m - 1 -> m",
    ],
    ONE_VALUE: [
        "instance_norm.call.33:max(m - 1, 1) -> m - 1",
    ],
    NO_MOMENTUM_NONE: [
        "batch_norm.complement.62:factor -> 1 - factor",
        "batch_norm.swap.56:swap if factor is None: | self.running_mean += factor * (mean"
        ".flatten() - self.running_mean)",
        "batch_norm.condition.62:if factor is None -> if False",
        "manual_batch_norm.complement.74:factor -> 1 - factor",
    ],
    FROZEN_STATISTICS: [
        "instance_norm.condition.29:if self.training -> if False",
    ],
    SIGN_OF_BETA: [
        "layer_norm.arithmetic.22:self.weight * x_hat + self.bias -> self.weight * x_hat "
        "- self.bias",
    ],
    INITIAL_MEAN: [
        "ghost_batch_norm.state.17:torch.zeros(shape) -> torch.ones(shape)",
    ],
}

EQUIVALENT = {name: reason for reason, names in REASONS.items() for name in names}
