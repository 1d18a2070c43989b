"""Properties: what any norm must do.

A property is one function in this file, with the decorator `norm_property`. It receives a `Make`,
and returns the largest difference that it found and the cause, if it knows one. The table prints
the properties in the order of this file.
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
    "shape and dtype are kept, in training and eval",
    tolerance=0,
    advice="return a tensor like the input",
)
def keeps_shape_and_dtype(make: Make) -> Answer:
    dtypes = (torch.float32, torch.float64)
    for num_dims, training, dtype in itertools.product(SHAPES, (True, False), dtypes):
        x = batch(num_dims, dtype=dtype)
        y = make(num_dims).to(dtype).train(training)(x)
        if (y.shape, y.dtype) != (x.shape, x.dtype):
            became = f"{tuple(x.shape)} of {x.dtype} became {tuple(y.shape)} of {y.dtype}"
            return float("inf"), became
    return 0, ""


@norm_property(
    "a fresh layer gives zero mean and unit variance",
    tolerance=2e-2,
    advice="normalize before gamma and beta",
)
def gives_zero_mean_and_unit_variance(make: Make) -> Answer:
    outputs = [layer(x).detach() for _, layer, x in each(make)]
    off_centre = max(abs(y.mean().item()) for y in outputs)
    has_unit_mean_square = all(abs(y.square().mean().item() - 1) < 2e-2 for y in outputs)
    if off_centre > 2e-2 and has_unit_mean_square:
        raise NotApplicable(
            f"its mean square is 1 and its mean {off_centre:.2f}: "
            "it does not centre, as an RMS norm"
        )
    return max(off_centre, *(abs(y.var(correction=0).item() - 1) for y in outputs)), ""


@norm_property(
    "the scale of the input does not matter",
    tolerance=1e-3,
    advice="divide by a statistic of the input",
)
def ignores_the_scale_of_the_input(make: Make) -> Answer:
    return max(difference(copy.deepcopy(layer)(4 * x), layer(x)) for _, layer, x in each(make)), ""


@norm_property(
    "a constant input gives finite results and gradients",
    tolerance=0,
    advice="add eps under the root",
)
def stays_finite_for_constant_input(make: Make) -> Answer:
    results = [t for _, layer, x in each(make) for t in step(layer, torch.ones_like(x))]
    return (0.0 if all(t.isfinite().all() for t in results) else float("inf")), ""


@norm_property(
    "training is told by module.training",
    tolerance=1e-9,
    advice="the mode follows torch.is_grad_enabled(): use self.training, or an evaluation with "
    "gradients, or a pass in training without, does the wrong thing",
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
    "eval is deterministic and changes no state",
    tolerance=0,
    advice="in eval mode read the state and leave it alone",
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
    "eval takes each image by itself",
    tolerance=1e-9,
    advice="eval uses the statistics of its batch: normalize by the running ones where "
    "self.training is False",
)
def eval_treats_samples_independently(make: Make) -> Answer:
    worst = 0.0
    for _, layer, x in each(make):
        layer(x + 1)
        worst = max(worst, difference(in_eval(layer, x[:1]), in_eval(layer, x)[:1]))
    return worst, ""


@norm_property(
    "eval agrees with training on a batch seen often",
    tolerance=5e-2,
    advice="the running statistics do not arrive at those of the batch",
)
def eval_agrees_with_training_after_many_steps(make: Make) -> Answer:
    return max(
        difference(in_eval(after_many_steps(layer, x), x), layer(x)) for _, layer, x in each(make)
    ), ""


@norm_property(
    "one odd batch does not overturn the running statistics",
    tolerance=0.5,
    advice="the newest batch outweighs all before it: is the momentum the wrong way round?",
)
def one_odd_batch_does_not_dominate(make: Make) -> Answer:
    moves = []
    for _, layer, x in each(make):
        after_many_steps(layer, x)
        before, odd = in_eval(layer, x), 3 * x + 50
        layer(odd)
        after, at_last = in_eval(layer, x), in_eval(after_many_steps(layer, odd), x)
        whole = (at_last - before).abs().max().item()
        # Statistics enter the output by a root and a quotient. This share is therefore not the
        # momentum, but it grows with it.
        moves.append((after - before).abs().max().item() / whole if whole > 1e-6 else 0.0)
    return max(moves), ""


@norm_property(
    "its state survives a checkpoint",
    tolerance=0,
    advice="what eval goes by is not in the state dict: register the statistics as buffers",
)
def state_survives_a_checkpoint(make: Make) -> Answer:
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
    "it can be copied and pickled",
    tolerance=0,
    advice="keep nothing in it that copy.deepcopy or pickle refuse",
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
    "no step hangs on the step before",
    tolerance=0,
    advice="detach the batch's statistics before they enter the buffers",
)
def keeps_no_graph_between_steps(make: Make) -> Answer:
    for _, layer, x in each(make):
        step(layer, x)
        step(layer, x)
        if any(b.requires_grad for b in layer.buffers()):
            return float("inf"), ""
    return 0, ""


@norm_property(
    "its gradient is that of what it computes",
    tolerance=1e-5,
    advice="compare it with torch.autograd.gradcheck",
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
            slope = gradients.slope(start, x, gradient, directions)
            own = sum(
                (g.flatten() @ d.flatten()).item()
                for g, d in zip((dx, *by_parameters), directions, strict=True)
            )
            worst = max(worst, abs(slope - own) / max(1.0, abs(slope)))
        if worst > 1e-5 and not note:
            note = gradients.missing_part(x, gradient, dx, eps_of(layer))
    return worst, note


@norm_property(
    "channels-last input gives the same result",
    tolerance=1e-9,
    advice="address dimensions by number, not by memory",
)
def is_independent_of_memory_format(make: Make) -> Answer:
    x = batch(4)
    layer = make(4).double().train()
    channels_last = step(copy.deepcopy(layer), x.to(memory_format=torch.channels_last))
    return difference(channels_last, step(copy.deepcopy(layer), x)), ""


@norm_property(
    "bfloat16 input gives the result to bfloat16's precision",
    tolerance=4e-2,
    advice="compute statistics in float32",
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
    "torch.compile gives the same result, in one graph",
    tolerance=1e-4,
    advice="see torch's notes on graph breaks",
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
                raise NotApplicable(
                    "torch.compile needs a C++ compiler, and there is none"
                ) from error
            raise
        worst = max(worst, difference(compiled, step(copy.deepcopy(layer), x)))
    return worst, ""
