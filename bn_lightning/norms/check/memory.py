"""Properties of the input's memory: layouts, slices, and modifications."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bn_lightning.norms.check import inputs
from bn_lightning.norms.check.findings import Comparison, norm_property
from bn_lightning.norms.check.subject import Norm


@norm_property(
    "input",
    "Neither the input nor the gradient of the output is modified.",
    advice="An operation in place, such as sub_ or +=, changes a tensor of the caller. Use the "
    "operation that returns a new tensor.",
    script="""
before = x.clone()
layer(x)
assert_close(x, before, rtol=0, atol=0)
""",
)
def input_unchanged(norm: Norm) -> Iterator[Comparison]:
    for case in norm.cases():
        for needs_gradient in (False, True):
            layer, x, g = case.layer(), case.x.requires_grad_(needs_gradient), case.gradient
            y = layer(x)
            before = y.detach().clone()
            if y.requires_grad:
                y.backward(g)
            pairs = ((x, case.x, "input"), (g, case.gradient, "gradient of the output"))
            for found, expected, name in pairs:
                cause = f"The layer modifies the {name}. {input_unchanged.advice}"
                yield Comparison(inputs.difference(found, expected), 0, cause)
            cause = "The backward pass modifies the output."
            yield Comparison(inputs.difference(y, before), 0, cause)
        x = case.x
        with torch.no_grad():
            case.layer()(x)
        cause = f"Without gradients, the layer modifies the input. {input_unchanged.advice}"
        yield Comparison(inputs.difference(x, case.x), 0, cause)


@norm_property(
    "input",
    "The memory layout of input and gradient changes neither output nor gradients.",
    advice="Do not assume contiguous memory: select dimensions by index, and avoid view(), "
    "data_ptr() and as_strided().",
    script="""
other = x.transpose(0, -1).contiguous().transpose(0, -1)
assert_close(copy.deepcopy(layer)(other), copy.deepcopy(layer)(x))
y = layer(x.requires_grad_())
g = torch.randn_like(y.transpose(0, -1)).transpose(0, -1)
(dx,) = torch.autograd.grad(y, x, g, retain_graph=True)
assert_close(dx, torch.autograd.grad(y, x, g.contiguous())[0])
""",
)
def memory_layout(norm: Norm) -> Iterator[Comparison]:
    for case in norm.cases(batch_sizes=(12,)):
        x, g = case.x, case.gradient
        constant = g[:1, :1].mean().view([1] * g.dim()).expand_as(g)
        repeated = x[:1].expand_as(x)
        plain = {"x": inputs.step(case.layer(), x, g)}
        plain["constant"] = inputs.step(case.layer(), x, constant.contiguous())
        plain["repeated"] = inputs.step(case.layer(), repeated.contiguous(), g)
        for name, layout in layouts(x).items():
            found = inputs.step(case.layer(), layout, g)
            what = _different(found, plain["x"], case.tolerance)
            cause = f"For input that is {name}, {what} differs. {memory_layout.advice}"
            yield Comparison(inputs.difference(found, plain["x"]), case.tolerance, cause)
        for name, layout in layouts(g).items():
            cause = (
                f"The result differs if the gradient of the output is {name}. "
                f"{memory_layout.advice}"
            )
            found = inputs.step(case.layer(), x, layout)
            yield Comparison(inputs.difference(found, plain["x"]), case.tolerance, cause)
        found = inputs.step(case.layer(), x, constant)
        cause = "The result differs if the gradient of the output is expanded, as that of sum()."
        yield Comparison(inputs.difference(found, plain["constant"]), case.tolerance, cause)
        found = inputs.step(case.layer(), repeated, g)
        cause = "The result differs for input that is expanded."
        yield Comparison(inputs.difference(found, plain["repeated"]), case.tolerance, cause)


def _different(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> str:
    """Return which results differ: the output, or gradients."""
    names = [
        n
        for n in found
        if not inputs.difference(found[n], expected.get(n, torch.zeros(0))) <= tolerance
    ]
    return "the output" if "output" in names else f"the gradient of {', '.join(names)}"


def layouts(x: Tensor) -> dict[str, Tensor]:
    """Return tensors with the values of x in other memory layouts, by their description."""
    first_and_last = x.transpose(0, -1).contiguous().transpose(0, -1)
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 7.0, dtype=x.dtype)
    wide[..., ::2] = x
    long = torch.full((len(x) + 3, *x.shape[1:]), 7.0, dtype=x.dtype)
    long[2:-1] = x
    found = {"transposed": first_and_last, "strided": wide[..., ::2], "a slice": long[2:-1]}
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if x.dim() in formats:
        found["in channels-last order"] = x.contiguous(memory_format=formats[x.dim()])
    elif x.dim() == 3:
        found["in channels-last order"] = x.transpose(1, 2).contiguous().transpose(1, 2)
    return found
