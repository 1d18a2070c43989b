"""Properties of derivatives, compared with finite differences."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bn_lightning.errors import describe_error
from bn_lightning.norms.check import gradients, inputs
from bn_lightning.norms.check.findings import Comparison, NotApplicable, norm_property
from bn_lightning.norms.check.subject import Case, Norm

GRADIENT_SCRIPT = """
p = dict(layer.named_parameters())
call = lambda x, *values: torch.func.functional_call(
    copy.deepcopy(layer), dict(zip(p, values)), x)
assert torch.autograd.gradcheck(call, (x.requires_grad_(), *p.values()))
"""


@norm_property(
    "derivatives",
    "In training, the gradients of input and parameters match finite differences.",
    advice="Find the wrong term with torch.autograd.gradcheck.",
    script=GRADIENT_SCRIPT,
)
def gradient_in_training(norm: Norm) -> Iterator[Comparison]:
    for case in norm.cases(training=(True,)):
        yield from gradients.compare(case)


@norm_property(
    "derivatives",
    "In evaluation, the gradients of input and parameters match finite differences.",
    advice="Find the wrong term with torch.autograd.gradcheck. In evaluation, the statistics are "
    "constants.",
    script=GRADIENT_SCRIPT,
)
def gradient_in_evaluation(norm: Norm) -> Iterator[Comparison]:
    for case in norm.cases(training=(False,)):
        yield from gradients.compare(case)


@norm_property(
    "derivatives",
    "Second derivatives match finite differences of the gradients.",
    advice="The backward pass is not differentiated correctly. Mark it with "
    "torch.autograd.function.once_differentiable, or write its own backward pass.",
    script="""
x = x[:4].clone().requires_grad_()
assert torch.autograd.gradgradcheck(lambda x: copy.deepcopy(layer)(x), (x,), atol=1e-4)
""",
)
def second_derivative(norm: Norm) -> Iterator[Comparison]:
    was_examined = False
    for case in norm.cases():
        # The finite differences would include the change of r and d, which are constants.
        is_smooth = case.kind.computes_in == torch.float64
        if not is_smooth or (case.training and case.kind.reads_past):
            continue
        try:
            numeric, exact = gradients.second_derivative(case)
        except Exception as error:
            raise NotApplicable(
                f"The layer has no second derivatives: {describe_error(error)}"
            ) from error
        was_examined = True
        yield Comparison(abs(numeric - exact) / max(1.0, abs(numeric)), 1e-5)
    if not was_examined:
        raise NotApplicable("The layer does not compute in float64, or treats terms as constants.")


@norm_property(
    "derivatives",
    "torch.func.grad gives the gradients of backward().",
    advice="A torch.autograd.Function needs setup_context and generate_vmap_rule for torch.func.",
    script="""
p = dict(layer.named_parameters())
loss = lambda x: torch.func.functional_call(copy.deepcopy(layer), p, (x,)).square().sum()
found = torch.func.grad(loss)(x)
assert_close(found, torch.autograd.grad(loss(x.requires_grad_()), x)[0])
""",
)
def functional_gradient(norm: Norm) -> Iterator[Comparison]:
    was_examined, reason = False, ""
    for case in norm.cases(batch_sizes=(12,)):
        try:
            found = gradients.by_torch_func(case)
        except Exception as error:
            # PyTorch's batch normalization raises in training too, because it updates buffers.
            reason = f"The layer does not support torch.func: {describe_error(error)}"
            continue
        was_examined = True
        expected = inputs.step(case.layer(), case.x, case.gradient)
        expected.pop("output")
        found = {name: gradient for name, gradient in found.items() if name in expected}
        yield Comparison(inputs.difference(found, expected), case.tolerance)
    if not was_examined:
        raise NotApplicable(reason)


@norm_property(
    "derivatives",
    "An operation in place behind the layer changes no gradient.",
    advice="The backward pass needs the output, or the output is a view. ResNets use "
    "F.relu(y, inplace=True) and y += x: save something else for the backward pass, and return a "
    "new tensor.",
    script="""
x.requires_grad_()
y = torch.relu(copy.deepcopy(layer)(x)).sum()
(expected,) = torch.autograd.grad(y, x)
z = torch.relu_(layer(x)).sum()
assert_close(torch.autograd.grad(z, x)[0], expected)
""",
)
def inplace_operation_behind(norm: Norm) -> Iterator[Comparison]:
    def add(y: Tensor, x: Tensor) -> Tensor:
        y += x
        return y

    behind: list[tuple[Callable[[Tensor, Tensor], Tensor], ...]] = [
        (lambda y, x: F.relu(y, inplace=True), lambda y, x: F.relu(y)),
        (add, lambda y, x: y + x),
        (lambda y, x: y.mul_(3), lambda y, x: 3 * y),
    ]
    for case in norm.cases():
        for pair in behind:
            try:
                results = [_gradients_behind(case, operation) for operation in pair]
            except RuntimeError as error:
                if case.kind.is_affine:
                    raise
                reason = describe_error(error)
                raise NotApplicable(f"The layer ends with another operation: {reason}") from error
            yield Comparison(inputs.difference(*results), case.tolerance)


def _gradients_behind(case: Case, operation: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    """Return the gradients of input and parameters with an operation behind the layer."""
    layer = case.layer()
    leaf = case.x.requires_grad_()
    torch.autograd.backward(operation(layer(leaf * 1), leaf), case.gradient)
    tensors = [leaf, *layer.parameters()]
    return [t.grad for t in tensors if t.grad is not None]


@norm_property(
    "derivatives",
    "Activation checkpointing changes neither output nor gradients.",
    advice="The forward pass is run again in the backward pass, and must then give the same "
    "output.",
    script="""
x.requires_grad_()
(expected,) = torch.autograd.grad(copy.deepcopy(layer)(x).square().sum(), x)
y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
assert_close(torch.autograd.grad(y.square().sum(), x)[0], expected)
""",
)
def activation_checkpointing(norm: Norm) -> Iterator[Comparison]:
    for case in norm.cases(batch_sizes=(12,)):
        expected = gradients.of_squares(case.layer(), case.x, case.gradient)
        layer = case.layer()
        call = partial(checkpoint, layer, use_reentrant=False)
        found = gradients.of_squares(layer, case.x, case.gradient, call)
        error = inputs.difference(found, expected)
        if case.kind.reads_past and case.training and not error <= case.tolerance:
            raise NotApplicable(
                "In training, the output depends on running statistics. The first forward pass "
                "changes them, so that the second one gives another output."
            )
        yield Comparison(error, case.tolerance)


@norm_property(
    "derivatives",
    "Gradients are right if the layer is used in both modes before the backward pass.",
    advice="The gradient is neither that of the running statistics before the training step nor "
    "that of those after it.",
    script="""
x.requires_grad_()
y = layer.eval()(x).sum() + layer.train()(x + 1).square().sum()
y.backward()
""",
)
def both_modes_before_backward(norm: Norm) -> Iterator[Comparison]:
    for case in norm.cases(training=(False,), batch_sizes=(12,)):
        g, other = case.gradient, case.x + 1
        layer = case.layer()
        leaf = case.x.requires_grad_()
        y = layer.eval()(leaf)
        layer.train()(other.requires_grad_()).backward(g)
        try:
            y.backward(g)
        except RuntimeError as error:
            if "inplace" not in str(error):
                raise
            raise NotApplicable(
                "The layer does not support it: in evaluation, the graph keeps the running "
                "statistics, which the next training step changes in place. Use a clone of them."
            ) from error
        if not case.kind.is_affine:
            is_finite = inputs.is_finite([leaf.grad])
            yield Comparison(0 if is_finite else float("inf"), 0)
            continue
        # The gradient may use the running statistics of before or after the training step.
        before, after = case.layer(), case.layer()
        after.train()(other.detach())
        expected = [inputs.step(layer.eval(), case.x, g)["input"] for layer in (before, after)]
        errors = [inputs.difference(leaf.grad, e) for e in expected]
        yield Comparison(inputs.smallest(errors), case.tolerance)


@norm_property(
    "derivatives",
    "Parameters with requires_grad=False do not change the other gradients.",
    advice="A gradient is missing or wrong if another one is not needed, as for frozen parameters. "
    "In a torch.autograd.Function, look at ctx.needs_input_grad.",
    script="""
x.requires_grad_()
(expected,) = torch.autograd.grad(copy.deepcopy(layer)(x).square().sum(), x)
y = layer.requires_grad_(False)(x)
assert_close(torch.autograd.grad(y.square().sum(), x)[0], expected)
""",
)
def frozen_parameters(norm: Norm) -> Iterator[Comparison]:
    for case in norm.cases(batch_sizes=(12,)):
        expected = inputs.step(case.layer(), case.x, case.gradient)
        names = [n for n, p in case.layer().named_parameters() if p.requires_grad]
        for frozen in [[name] for name in names] + [names]:
            layer = case.layer()
            for name in frozen:
                layer.get_parameter(name).requires_grad_(False)
            found = inputs.step(layer, case.x, case.gradient)
            others = {k: v for k, v in expected.items() if k not in frozen}
            yield Comparison(inputs.difference(found, others), case.tolerance)
        if names:
            layer = case.layer()
            y = layer(case.x)
            if y.requires_grad:
                y.backward(case.gradient)
            found = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
            others = {k: v for k, v in expected.items() if k not in ("output", "input")}
            yield Comparison(inputs.difference(found, others), case.tolerance)


@norm_property(
    "derivatives",
    "No autograd graph is kept from one training step to the next.",
    advice="Detach the statistics of the batch before they are stored.",
    script="""
for _ in range(2):
    layer.train()(x.requires_grad_()).square().sum().backward()
assert not any(b.requires_grad for b in layer.buffers())
""",
)
def no_graph_between_steps(norm: Norm) -> Iterator[Comparison]:
    for case in norm.cases(training=(True,), batch_sizes=(12,)):
        layer = case.layer()
        for _ in range(2):
            inputs.step(layer, case.x, case.gradient)
        kept = [name for name, b in layer.named_buffers() if b.requires_grad]
        kept += [
            name
            for module in layer.modules()
            for name, value in vars(module).items()
            if isinstance(value, Tensor) and value.grad_fn is not None
        ]
        cause = f"After a step, the layer keeps its graph: {', '.join(kept)}. Detach the values."
        yield Comparison(len(kept), 0, cause)
