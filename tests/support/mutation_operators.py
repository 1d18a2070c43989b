"""Mutation operators for normalization layers: small changes of Python source.

An operator is a function of a node of the syntax tree and its function (None outside of functions).
It yields the changes which it can make at that node, as pairs: a description, and the new node.
These operators know little more than Python. Those in `layer_operators.py` are patterns of layers
written with PyTorch, and their replacements.

mutmut 3 and cosmic-ray 8 are not used. Their operators replace arithmetic, comparisons, constants
and keywords. They delete and swap no statements, and have no operators for reductions, buffers,
dtypes or gradients, which are most of those used here. Both also run the tests themselves, and
have many dependencies, among them a user interface for the terminal and a database.
"""

import ast
import copy
import itertools
from ast import unparse

INVERSE = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
BOUNDARY = {ast.Eq: ast.LtE, ast.Lt: ast.LtE, ast.Gt: ast.GtE}


def expression(text):
    return ast.parse(text, mode="eval").body


def change(node, new):
    """Return a change of a node, with its description."""
    new = expression(new) if isinstance(new, str) else new
    return f"{unparse(node)} -> {unparse(new)}", new


def name_of(function):
    return function.name if function else None


def arithmetic(node, function):
    """Replace + by -, * by / and so on, or keep only one operand."""
    if name_of(function) == "__init__":
        return
    if isinstance(node, ast.BinOp) and type(node.op) in INVERSE:
        yield change(node, ast.BinOp(node.left, INVERSE[type(node.op)](), node.right))
        yield change(node, node.left)
        yield change(node, node.right)
    elif isinstance(node, ast.AugAssign):
        yield change(node, ast.AugAssign(node.target, INVERSE[type(node.op)](), node.value))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield change(node, node.operand)


def condition(node, function):
    """Negate or fix a condition, or change its boundary."""
    if name_of(function) == "__init__":
        return
    if isinstance(node, ast.If):
        text = unparse(node.test)
        others = [f"not ({text})", "True", "False"]
        if "self.training" in text:
            others.append(text.replace("self.training", "torch.is_grad_enabled()"))
        for other in others:
            replacement = copy.copy(node)
            replacement.test = expression(other)
            yield f"if {text} -> if {other}", replacement
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield change(node, value)
        yield change(node, ast.BoolOp(ast.Or(), node.values))
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in BOUNDARY:
        boundary = BOUNDARY[type(node.ops[0])]()
        yield change(node, ast.Compare(node.left, [boundary], node.comparators))
    elif isinstance(node, ast.Call):
        for position, argument in enumerate(node.args):
            if unparse(argument) == "self.training":
                for value in ("True", "False"):
                    replacement = copy.copy(node)
                    replacement.args = list(node.args)
                    replacement.args[position] = expression(value)
                    yield f"argument self.training -> {value}", replacement


def constant(node, function):
    """Change a number by one, or double it, or flip a truth value."""
    if not isinstance(node, ast.Constant) or isinstance(node.value, str) or node.value is None:
        return
    if isinstance(node.value, bool):
        others = [not node.value]
    elif isinstance(node.value, int):
        others = [node.value + 1, node.value - 1]
    else:
        others = [2 * node.value, 0.0]
    for other in others:
        yield change(node, ast.Constant(other))


def delete(node, function):
    """Delete a statement, unless its variable would be undefined."""
    deletable = isinstance(node, ast.AugAssign) or (
        isinstance(node, ast.Expr) and "super()" not in unparse(node)
    )
    if isinstance(node, ast.Assign):
        targets = {unparse(target) for target in node.targets}
        read = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
        deletable = targets <= read
    if deletable and not isinstance(getattr(node, "value", None), ast.Constant):
        yield f"delete {unparse(node)}", ast.Pass()


def repeat(node, function):
    """Execute an update twice."""
    if name_of(function) == "reset_running_stats":
        return
    is_update = isinstance(node, ast.Expr) and "_(" in unparse(node)
    if isinstance(node, ast.AugAssign) or (is_update and "running" in unparse(node)):
        yield f"repeat {unparse(node)}", ast.If(ast.Constant(True), [node, node], [])


def swap(node, function):
    """Swap two adjacent statements of which one changes what the other uses."""
    body = getattr(node, "body", None)
    if name_of(function) in (None, "__init__") or not isinstance(body, list):
        return
    for i, (first, second) in enumerate(itertools.pairwise(body)):
        if isinstance(second, ast.Return):
            continue
        # Otherwise `second` would read a variable that is not defined yet.
        defined = (written(first) - used(first, ast.Load)) & used(second, ast.Load)
        if not defined and (written(first) & used(second) or written(second) & used(first)):
            replacement = copy.copy(node)
            replacement.body = [*body[:i], second, first, *body[i + 2 :]]
            texts = [unparse(part).partition("\n")[0] for part in (first, second)]
            yield f"swap {texts[0]} | {texts[1]}", replacement


def used(node, context=(ast.Load, ast.Store)):
    """Return the variables and attributes in a statement, such as "x" and "self.running_mean"."""
    places = (n for n in ast.walk(node) if isinstance(n, ast.Name | ast.Attribute))
    return {unparse(n) for n in places if isinstance(n.ctx, context)} - {"self", "torch"}


def written(node):
    """Return the variables and attributes that a statement assigns or changes in place."""
    in_place = {
        unparse(n.func.value)
        for n in ast.walk(node)
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr[-1] == "_"
    }
    return used(node, ast.Store) | in_place


def call(node, function):
    """Remove a method or function from a chain of calls: x.detach() becomes x."""
    if not isinstance(node, ast.Call) or name_of(function) == "__init__":
        return
    if isinstance(node.func, ast.Attribute):
        owner = unparse(node.func.value)
        if owner == "torch":
            for argument in node.args:
                yield change(node, argument)
        elif owner not in ("self", "super()", "ctx", "dist", "Normalize"):
            yield change(node, node.func.value)
    elif unparse(node.func) in ("max", "all_reduce"):
        for argument in node.args:
            yield change(node, argument)


OPERATORS = (arithmetic, condition, constant, delete, repeat, swap, call)
