"""Mutants that no check can catch, each with the reason why it is correct.

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
}

EQUIVALENT = {name: reason for reason, names in REASONS.items() for name in names}
