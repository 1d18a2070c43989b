"""Mutation operators for layers written with PyTorch: patterns of code, and their replacements.

See `mutation_operators.py` for what an operator is.
"""

import ast
import copy
from ast import unparse

from tests.support.mutation_operators import change, expression, name_of, used

IN_PLACE = {ast.Add: "add_", ast.Sub: "sub_", ast.Mult: "mul_", ast.Div: "div_"}
REDUCTIONS = ("sum", "mean", "var_mean")
# The input of a layer, a view of it, and the incoming gradient.
INPUTS = ("x", "groups", "grad")
# Names with similar roles, which can be confused.
SIMILAR = (
    ("mean", "var"),
    ("mean", "std"),
    ("sums", "squares"),
    ("weight", "bias"),
    ("grad_weight", "grad_bias"),
    ("running_mean", "running_var"),
    ("running_mean", "running_std"),
    ("r", "d"),
)
# Variables through which gradients flow, and the methods that are called on them.
DIFFERENTIATED = (
    *("x", "groups", "mean", "var", "std", "sums", "squares", "mean_square", "x_hat", "y"),
    *("self.weight", "self.bias"),
)
METHODS = (*REDUCTIONS, "square", "split", "unflatten", "view", "to", "clamp")
# Autograd does not record these functions: the constructor, the updates of buffers, and those of a
# torch.autograd.Function. A detached tensor would change only the derivatives of `backward`.
NOT_RECORDED = (None, "__init__", "reset_running_stats", "update_running_stats", "backward")


def statement(text):
    return ast.parse(text).body[0]


def axes(node, function):
    """Reduce over fewer axes, or over all."""
    if isinstance(node, ast.List) and unparse(node).endswith("*range(2, num_dims)]"):
        for i, element in enumerate(node.elts):
            yield f"{unparse(node)} without {unparse(element)}", ast.List(without(node.elts, i))
    if not is_method(node, *REDUCTIONS):
        return
    axes = next((a for a in node.args if "axes" in unparse(a)), None)
    if axes is not None:
        for part in ("[1:]", "[:-1]"):
            replacement = copy.copy(node)
            sliced = expression(f"{unparse(axes)}{part}")
            replacement.args = [sliced if a is axes else a for a in node.args]
            yield change(node, replacement)
    for i, keyword in enumerate(node.keywords):
        replacement = copy.copy(node)
        replacement.keywords = without(node.keywords, i)
        if keyword.arg != "keepdim":
            yield change(node, replacement)


def without(items, index):
    return [*items[:index], *items[index + 1 :]]


def is_method(node, *names):
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in names
    )


def confuse(node, function):
    """Replace a name by that of something similar."""
    if name_of(function) == "__init__" or not isinstance(getattr(node, "ctx", None), ast.Load):
        return
    for pair in SIMILAR:
        for name, other in (pair, pair[::-1]):
            if isinstance(node, ast.Name) and node.id == name:
                stored = (n for n in ast.walk(function) if isinstance(n, ast.Name | ast.arg))
                if any(getattr(n, "id", getattr(n, "arg", None)) == other for n in stored):
                    yield change(node, other)
            if isinstance(node, ast.Attribute) and node.attr == name:
                yield change(node, f"{unparse(node.value)}.{other}")


def complement(node, function):
    """Weight the old value by the momentum, instead of the new one."""
    is_momentum = unparse(node) in ("self.momentum", "factor") if is_load(node) else False
    if is_momentum and name_of(function) != "__init__":
        yield change(node, f"1 - {unparse(node)}")


def is_load(node):
    return isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load)


def state(node, function):
    """Store a parameter or buffer as something else, or with another initial value."""
    if name_of(function) != "__init__":
        return
    if isinstance(node, ast.Assign) and "nn.Parameter" in unparse(node):
        target, value = node.targets[0], node.value.args[0]
        yield (
            f"{target.attr}: buffer",
            statement(f"self.register_buffer({target.attr!r}, {unparse(value)})"),
        )
    if not isinstance(node, ast.Call):
        return
    text = unparse(node)
    if text.startswith("nn.Parameter("):
        value = unparse(node.args[0])
        yield change(node, value)
        yield change(node, f"nn.Parameter({value}, requires_grad=False)")
        yield change(node, f"globals().setdefault({value!r}, {text})")
    if is_method(node, "register_buffer"):
        name, value = node.args[0].value, unparse(node.args[1])
        yield change(node, f"setattr(self, {name!r}, {value})")
        yield change(node, f"self.register_buffer({name!r}, {value}, persistent=False)")
        shared = f"globals().setdefault({name + value!r}, {value})"
        yield change(node, f"self.register_buffer({name!r}, {shared})")
        if value != "torch.tensor(0)":
            yield change(node, f"self.register_parameter({name!r}, nn.Parameter({value}))")
    for one, other in (("torch.zeros", "torch.ones"), ("torch.ones", "torch.zeros")):
        if unparse(node.func) == one:
            yield change(node, text.replace(one, other))


def in_place(node, function):
    """Change the input of the layer, or the incoming gradient, in place."""
    if isinstance(node, ast.BinOp) and unparse(node.left) in INPUTS:
        method = IN_PLACE[type(node.op)]
        yield change(node, f"{unparse(node.left)}.{method}({unparse(node.right)})")
    if is_method(node, "square") and unparse(node.func.value) in INPUTS:
        yield change(node, f"{unparse(node.func.value)}.square_()")


def first_batch(node, function):
    """Keep the number of values of the first batch."""
    if isinstance(node, ast.Assign) and unparse(node.targets[0]) == "m":
        has_self = function.args.args[0].arg == "self"
        attributes = "self.__dict__" if has_self else "globals()"
        value = f"{attributes}.setdefault('m', {unparse(node.value)})"
        yield f"m = {value}", statement(f"m = {value}")


def layout(node, function):
    """Read the memory of the input as if it were contiguous."""
    if (
        isinstance(node, ast.FunctionDef)
        and node.name == "forward"
        and "self" in unparse(node.args)
    ):
        replacement = copy.copy(node)
        line = "x = x.as_strided(x.shape, torch.empty(x.shape).stride())"
        replacement.body = [statement(line), *node.body]
        yield line, replacement


def variance(node, function):
    """Compute the variance as E[x^2] - E[x]^2, or divide by m - 1."""
    if is_method(node, "sum", "mean") and is_method(node.func.value, "square"):
        difference = node.func.value.func.value
        arguments = unparse(ast.Call(ast.Name("f"), node.args, node.keywords))[1:]
        if isinstance(difference, ast.BinOp):
            x, mean = unparse(difference.left), unparse(difference.right)
            squares = f"{x}.square().{node.func.attr}{arguments}"
            count = f" * ({x}.numel() / {mean}.numel())" if node.func.attr == "sum" else ""
            yield change(node, f"{squares} - {mean}.square(){count}")
            if node.func.attr == "mean":
                yield change(node, f"{x}.var{arguments}")
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        divisor = unparse(node.right)
        if divisor in ("m", "m.clamp(min=1)"):
            yield change(node, f"{unparse(node.left)} / ({divisor} - 1)")


def detach(node, function):
    """Treat a tensor as a constant in the backward pass."""
    is_autograd_function = function and function.args.args[0].arg != "self"
    if name_of(function) in NOT_RECORDED or is_autograd_function:
        return
    if isinstance(node, ast.BinOp):
        if unparse(node.left) in DIFFERENTIATED:
            yield change(node, ast.BinOp(detached(node.left), node.op, node.right))
        if unparse(node.right) in DIFFERENTIATED:
            yield change(node, ast.BinOp(node.left, node.op, detached(node.right)))
    if is_method(node, *METHODS) and unparse(node.func.value) in DIFFERENTIATED:
        method = ast.Attribute(detached(node.func.value), node.func.attr)
        yield change(node, ast.Call(method, node.args, node.keywords))
    if isinstance(node, ast.Assign) and used(node.targets[0]) & set(DIFFERENTIATED):
        yield f"no_grad: {unparse(node)}", statement(f"with torch.no_grad(): {unparse(node)}")


def detached(node):
    return expression(f"{unparse(node)}.detach()")


def synchronization(node, function):
    """Synchronize less: equal shards, the mean of sums, local gradients or running statistics."""
    if isinstance(node, ast.Call) and unparse(node.func) == "all_reduce":
        value, text = unparse(node.args[0]), unparse(node)
        yield change(node, f"{value} * dist.get_world_size()")
        yield change(node, f"{text} / dist.get_world_size()")
        yield change(node, f"{value} + ({text} - {value}).detach()")
    if is_method(node, "update_running_stats") and "all_reduce" in unparse(function):
        for position, local in enumerate(("x.mean(self.axes)", "x.var(self.axes)")):
            replacement = copy.copy(node)
            replacement.args = list(node.args)
            replacement.args[position] = expression(local)
            yield f"local running statistics: {local}", replacement


def epsilon(node, function):
    """Double eps, or add it to the deviation instead of the variance."""
    text = unparse(node) if isinstance(node, ast.Call | ast.BinOp) else ""
    if isinstance(node, ast.BinOp) and text.endswith("eps") and isinstance(node.op, ast.Add):
        yield change(node, f"{unparse(node.left)} + 2 * {unparse(node.right)}")
    inner = None
    if text.startswith("torch.sqrt("):
        inner = node.args[0]
        new = "(torch.sqrt({}) + {})"
    elif is_method(node, "rsqrt"):
        inner = node.func.value
        new = "1 / ({}.sqrt() + {})"
    if isinstance(inner, ast.BinOp):
        yield change(node, new.format(unparse(inner.left), unparse(inner.right)))


def dtype(node, function):
    """Compute in fewer bits."""
    if is_load(node) and unparse(node) == "torch.float32":
        yield change(node, "torch.float16")
    if is_method(node, "to", "float"):
        yield change(
            node,
            f"{unparse(node.func.value)}.bfloat16().{node.func.attr}"
            f"({', '.join(map(unparse, node.args))})",
        )


OPERATORS = (
    axes,
    confuse,
    complement,
    state,
    in_place,
    first_batch,
    layout,
    variance,
    detach,
    synchronization,
    epsilon,
    dtype,
)
