"""Identity checks: whether a norm gives the same results as PyTorch's BatchNorm.

A norm of another kind, such as group normalization, should differ. Each check is one
function with the decorator `batch_norm_identity`. The table lists them in the order of
this file.
"""

import itertools

import torch
from torch import Tensor, nn

from bn_lightning.norms.check.findings import Answer, Make, NotApplicable, batch_norm_identity
from bn_lightning.norms.check.probes import (
    FEATURES,
    all_but_channels,
    batch,
    difference,
    each,
    eps_of,
    in_eval,
    normalized,
    reference_layer,
    step,
)

AXES = {2: ("images", "channels"), 4: ("images", "channels", "height", "width")}

# Common mistakes in running statistics: the weight of the newest batch, and the
# correction of m.
WRONG_RUNNING_STATS = {
    "The running variance is biased: it is divided by m instead of m - 1.": (0.1, 0),
    "The momentum is inverted: the newest batch has weight 0.9 instead of 0.1.": (0.9, 1),
    "The running variance is biased, and the momentum is inverted.": (0.9, 0),
}


@batch_norm_identity(
    "output in training mode",
    tolerance=1e-6,
    advice="The output is not (x - mean) / sqrt(var + eps), or the statistics are not those of the "
    "batch.",
)
def same_output_in_training(make: Make) -> Answer:
    worst, note = 0.0, ""
    for num_dims, layer, x in each(make):
        reference = reference_layer(layer, num_dims)
        batches = [batch(num_dims, seed) for seed in (1, 2)]
        largest = max(difference(layer(b), reference(b)) for b in batches)
        y = layer(x)
        largest = max(largest, difference(y, reference(x)))
        worst = max(worst, largest)
        if largest > 1e-6 and not note:
            note = _other_axes(y, x, eps_of(layer))
    return worst, note


def _other_axes(y: Tensor, x: Tensor, eps: float) -> str:
    """Return a note that names the axes over which x was normalized, or "" if there are none."""
    note, num_dims = "", x.dim()
    for n in range(1, num_dims + 1):
        for axes in itertools.combinations(range(num_dims), n):
            if difference(y, normalized(x, axes, eps)) < 1e-6:
                pair = (axes, all_but_channels(num_dims))
                own, right = (", ".join(AXES[num_dims][a] for a in chosen) for chosen in pair)
                note = (
                    f"The statistics are taken over {own}. "
                    f"Batch normalization takes them over {right}."
                )
    return note


@batch_norm_identity("gradients with respect to input and parameters", tolerance=1e-6)
def same_gradients(make: Make) -> Answer:
    worst = 0.0
    for num_dims, layer, x in each(make):
        own = _gradients(step(layer, x))
        worst = max(worst, difference(own, _gradients(step(reference_layer(layer, num_dims), x))))
    return worst, ""


def _gradients(results: list[Tensor]) -> list[Tensor]:
    """Return the gradients with respect to input, gamma and beta, from those of a step."""
    _, dx, *by_parameters = results
    if [g.numel() for g in by_parameters] != [FEATURES, FEATURES]:
        raise NotApplicable(
            "The layer does not have exactly two parameters with one value per channel."
        )
    return [dx, *by_parameters]


@batch_norm_identity("running statistics after three steps", tolerance=1e-6)
def same_running_stats(make: Make) -> Answer:
    worst, note = 0.0, ""
    for num_dims, layer, _ in each(make):
        reference = reference_layer(layer, num_dims)
        batches = [batch(num_dims, seed) for seed in range(3)]
        for x in batches:
            layer(x)
            reference(x)
        largest = difference(_running_stats(layer), _running_stats(reference))
        worst = max(worst, largest)
        if largest > 1e-6 and not note:
            note = _wrong_running_stats(layer, batches)
    return worst, note


def _running_stats(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the layer's running mean and variance, (C,) each, found by the names of buffers."""
    buffers = list(layer.named_buffers())
    found = [[b for name, b in buffers if word in name] for word in ("mean", "var")]
    if not all(found):
        raise NotApplicable("The layer has no buffers with mean and var in their names.")
    return found[0][0].flatten(), found[1][0].flatten()


def _wrong_running_stats(layer: nn.Module, batches: list[Tensor]) -> str:
    """Return the mistake that explains the running statistics, or "" if none does."""
    for mistake, (momentum, correction) in WRONG_RUNNING_STATS.items():
        mean = torch.zeros(FEATURES, dtype=torch.float64)
        var = torch.ones(FEATURES, dtype=torch.float64)
        for x in batches:
            axes = all_but_channels(x.dim())
            mean = mean.lerp(x.mean(axes), momentum)
            var = var.lerp(x.var(axes, correction=correction), momentum)
        if difference(_running_stats(layer), (mean, var)) < 1e-6:
            return mistake
    return ""


@batch_norm_identity("output in eval mode, given its own running statistics", tolerance=1e-6)
def same_output_in_eval(make: Make) -> Answer:
    worst = 0.0
    for num_dims, layer, x in each(make):
        layer(x + 1)
        mean, var = (t.view(1, -1, *[1] * (num_dims - 2)) for t in _running_stats(layer))
        expected = (x - mean) / (var + eps_of(layer)).sqrt()
        worst = max(worst, difference(in_eval(layer, x), expected))
    return worst, ""


@batch_norm_identity("state dicts are interchangeable", tolerance=1e-6)
def state_dicts_interchange(make: Make) -> Answer:
    worst = 0.0
    for num_dims, layer, x in each(make):
        reference = reference_layer(layer, num_dims)
        if layer.state_dict().keys() != reference.state_dict().keys():
            raise NotApplicable(f"The state dict has other keys: {', '.join(layer.state_dict())}.")
        layer(x)
        reference.load_state_dict(layer.state_dict())
        back = make(num_dims).double()
        back.load_state_dict(reference.state_dict())
        worst = max(worst, difference(in_eval(reference, x), in_eval(layer, x)))
        worst = max(worst, difference(in_eval(back, x), in_eval(layer, x)))
    return worst, ""
