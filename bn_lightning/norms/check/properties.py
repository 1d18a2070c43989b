"""Properties that every norm should have.

Each property is one function with the decorator `norm_property`. The function receives
a `Make`, which builds new layers. It returns the largest difference and its cause, or
"" if the cause is unknown. The table lists the properties in the order of this file.
"""

import copy
import io
import itertools
import pickle

import torch

from bn_lightning.norms.check import gradients
from bn_lightning.norms.check.findings import Answer, Make, NotApplicable, norm_property
from bn_lightning.norms.check.probes import (
    SHAPES,
    after_many_steps,
    batch,
    difference,
    each,
    eps_of,
    gradient_of,
    in_eval,
    step,
)


@norm_property(
    "output has the shape and dtype of the input",
    tolerance=0,
    advice="Return a tensor with the shape and dtype of the input.",
)
def keeps_shape_and_dtype(make: Make) -> Answer:
    dtypes = (torch.float32, torch.float64)
    for num_dims, training, dtype in itertools.product(SHAPES, (True, False), dtypes):
        x = batch(num_dims, dtype=dtype)
        y = make(num_dims).to(dtype).train(training)(x)
        if (y.shape, y.dtype) != (x.shape, x.dtype):
            given = f"The input is {tuple(x.shape)} with {x.dtype}"
            returned = f"the output is {tuple(y.shape)} with {y.dtype}"
            return float("inf"), f"{given}, but {returned}."
    return 0, ""


@norm_property(
    "output of a new layer has zero mean and unit variance",
    tolerance=2e-2,
    advice="Normalize before applying gamma and beta.",
)
def gives_zero_mean_and_unit_variance(make: Make) -> Answer:
    outputs = [layer(x).detach() for _, layer, x in each(make)]
    largest_mean = max(abs(y.mean().item()) for y in outputs)
    has_unit_mean_square = all(abs(y.square().mean().item() - 1) < 2e-2 for y in outputs)
    if largest_mean > 2e-2 and has_unit_mean_square:
        raise NotApplicable(
            f"The output has mean square 1 and mean {largest_mean:.2f}. "
            "Like RMSNorm, the layer does not center its input."
        )
    return max(largest_mean, *(abs(y.var(correction=0).item() - 1) for y in outputs)), ""


@norm_property(
    "output does not depend on the scale of the input",
    tolerance=1e-3,
    advice="Divide by a statistic of the input that grows with its scale.",
)
def ignores_the_scale_of_the_input(make: Make) -> Answer:
    return max(difference(copy.deepcopy(layer)(4 * x), layer(x)) for _, layer, x in each(make)), ""


@norm_property(
    "output and gradients are finite for constant input",
    tolerance=0,
    advice="Add eps to the variance before taking the square root.",
)
def stays_finite_for_constant_input(make: Make) -> Answer:
    results = [t for _, layer, x in each(make) for t in step(layer, torch.ones_like(x))]
    return (0.0 if all(t.isfinite().all() for t in results) else float("inf")), ""


@norm_property(
    "mode follows module.training",
    tolerance=1e-9,
    advice="The mode follows torch.is_grad_enabled(). Use self.training. Otherwise evaluation with "
    "gradients and training without gradients use the wrong statistics.",
)
def follows_module_training(make: Make) -> Answer:
    worst = 0.0
    for _, layer, x in each(make):
        layer(x + 1)
        for training in (True, False):
            layer.train(training)
            with_gradients = copy.deepcopy(layer)(x)
            with torch.no_grad():
                worst = max(worst, difference(copy.deepcopy(layer)(x), with_gradients))
    return worst, ""


@norm_property(
    "eval mode is deterministic and changes no state",
    tolerance=0,
    advice="In eval mode, do not write to buffers or parameters.",
)
def eval_is_deterministic_and_changes_no_state(make: Make) -> Answer:
    worst = 0.0
    for _, layer, x in each(make):
        layer(x + 1)
        layer.eval()
        before = copy.deepcopy(layer.state_dict())
        with torch.no_grad():
            worst = max(worst, difference(layer(x), layer(x)))
        worst = max(worst, difference(list(layer.state_dict().values()), list(before.values())))
    return worst, ""


@norm_property(
    "eval mode normalizes each sample independently",
    tolerance=1e-9,
    advice="Eval mode uses the statistics of the batch. Use the running statistics if "
    "self.training is False.",
)
def eval_treats_samples_independently(make: Make) -> Answer:
    worst = 0.0
    for _, layer, x in each(make):
        layer(x + 1)
        worst = max(worst, difference(in_eval(layer, x[:1]), in_eval(layer, x)[:1]))
    return worst, ""


@norm_property(
    "eval output equals training output after many steps",
    tolerance=5e-2,
    advice="The running statistics do not converge to those of the batch.",
)
def eval_agrees_with_training_after_many_steps(make: Make) -> Answer:
    return max(
        difference(in_eval(after_many_steps(layer, x), x), layer(x)) for _, layer, x in each(make)
    ), ""


@norm_property(
    "one outlier batch does not dominate the running statistics",
    tolerance=0.5,
    advice="The newest batch has more weight than all earlier batches. The momentum may be "
    "inverted.",
)
def one_outlier_batch_does_not_dominate(make: Make) -> Answer:
    moves = []
    for _, layer, x in each(make):
        after_many_steps(layer, x)
        outlier = 3 * x + 50
        before = in_eval(layer, x)
        layer(outlier)
        after_one = in_eval(layer, x)
        after_many = in_eval(after_many_steps(layer, outlier), x)
        total_move = (after_many - before).abs().max().item()
        # The output is not linear in the statistics. The ratio is therefore not the
        # momentum, but it increases with the momentum.
        move = (after_one - before).abs().max().item()
        moves.append(move / total_move if total_move > 1e-6 else 0.0)
    return max(moves), ""


@norm_property(
    "state is restored from a checkpoint",
    tolerance=0,
    advice="The state dict lacks values that eval mode uses. Register the statistics as buffers.",
)
def state_is_restored_from_a_checkpoint(make: Make) -> Answer:
    worst = 0.0
    for num_dims, layer, x in each(make):
        step(layer, x)
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        restored = make(num_dims).double()
        restored.load_state_dict(torch.load(file, weights_only=True))
        worst = max(worst, difference(in_eval(restored, x), in_eval(layer, x)))
    return worst, ""


@norm_property(
    "layer can be copied and pickled",
    tolerance=0,
    advice="Remove attributes that copy.deepcopy or pickle cannot copy.",
)
def can_be_copied_and_pickled(make: Make) -> Answer:
    worst = 0.0
    for _, layer, x in each(make):
        layer(x)
        layer.zero_grad()
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            worst = max(worst, difference(in_eval(other, x), in_eval(layer, x)))
    return worst, ""


@norm_property(
    "no autograd graph is kept between steps",
    tolerance=0,
    advice="Detach the statistics of the batch before updating the buffers.",
)
def keeps_no_graph_between_steps(make: Make) -> Answer:
    for _, layer, x in each(make):
        step(layer, x)
        step(layer, x)
        if any(b.requires_grad for b in layer.buffers()):
            return float("inf"), ""
    return 0, ""


@norm_property(
    "gradient matches finite differences",
    tolerance=1e-5,
    advice="Find the wrong term with torch.autograd.gradcheck.",
)
def gradient_matches_finite_differences(make: Make) -> Answer:
    worst, note = 0.0, ""
    for _, layer, x in each(make):
        start = copy.deepcopy(layer)
        y, dx, *by_parameters = step(layer, x)
        gradient = gradient_of(y.shape)
        shapes = [t.shape for t in (x, *(p for p in start.parameters() if p.requires_grad))]
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            directions = [
                torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
            ]
            numeric = gradients.slope(start, x, gradient, directions)
            analytic = sum(
                (g.flatten() @ d.flatten()).item()
                for g, d in zip((dx, *by_parameters), directions, strict=True)
            )
            worst = max(worst, abs(numeric - analytic) / max(1.0, abs(numeric)))
        if worst > 1e-5 and not note:
            note = gradients.missing_part(x, gradient, dx, eps_of(layer))
    return worst, note


@norm_property(
    "channels-last input gives the same output and gradients",
    tolerance=1e-9,
    advice="Do not assume contiguous memory: select dimensions by index, and avoid view().",
)
def is_independent_of_memory_format(make: Make) -> Answer:
    x = batch(4)
    layer = make(4).double().train()
    channels_last = step(copy.deepcopy(layer), x.to(memory_format=torch.channels_last))
    return difference(channels_last, step(copy.deepcopy(layer), x)), ""


@norm_property(
    "output for bfloat16 input is accurate to bfloat16 precision",
    tolerance=4e-2,
    advice="Compute the statistics in float32.",
)
def is_precise_for_bfloat16_input(make: Make) -> Answer:
    worst = 0.0
    for num_dims in SHAPES:
        x = batch(num_dims, dtype=torch.bfloat16)
        layer = make(num_dims).train()
        exact = copy.deepcopy(layer)(x.float())
        worst = max(worst, difference(copy.deepcopy(layer)(x), exact))
    return worst, ""


@norm_property(
    "torch.compile gives the same output and gradients in one graph",
    tolerance=1e-4,
    advice="Compiled and eager results differ. Compile parts of forward to find the cause.",
)
def compiles_in_one_graph(make: Make) -> Answer:
    worst = 0.0
    for num_dims in SHAPES:
        x = batch(num_dims, dtype=torch.float32)
        layer = make(num_dims).float().train()
        torch.compiler.reset()
        compiled_layer = torch.compile(copy.deepcopy(layer), fullgraph=True)
        try:
            compiled = step(compiled_layer, x)  # type: ignore[arg-type]
        except Exception as error:
            if "InvalidCxxCompiler" in str(error):
                raise NotApplicable("torch.compile found no C++ compiler.") from error
            raise
        worst = max(worst, difference(compiled, step(copy.deepcopy(layer), x)))
    return worst, ""
