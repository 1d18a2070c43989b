"""Fold normalization layers into the layers before them, decided by what a module does.

A module of any class can be folded if it is an affine map per channel: y = a * x + b. In evaluation
batch normalization is one, whoever wrote it.
"""

import copy
from collections import Counter

import torch
from torch import Tensor, fx, nn

from bn_lightning.errors import describe_error

# The weights of these are (C, ...), where C is the number of channels of the output.
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NO_NORMS = {f"torch.nn.modules.{kind}" for kind in ("activation", "pooling", "dropout", "flatten")}
TOLERANCE = 1e-5  # relative to the largest value, where that is above 1


@torch.no_grad()
def fold(network: nn.Module, x: Tensor) -> tuple[nn.Module, list[str]]:
    """Fold each module that is an affine map per channel into the layer right before it.

    That is decided by what the module does to `x` and to random input, never by its class.

    Args:
        network: in eval mode; it is not changed.
        x: a batch of its input.

    Returns:
        The folded network and its notes. A note names a module that was folded, or one that was not
        and is no layer, activation, pooling, dropout or flatten of torch. A network that torch.fx
        cannot trace is returned as it is, and the note says so.
    """
    try:
        graph = _Tracer().trace(network)
    except Exception as error:  # tracing runs the network's own code, which may raise anything
        reason = describe_error(error)
        return network, [f"nothing is folded, since torch.fx cannot trace the network: {reason}"]
    folded = fx.GraphModule(copy.deepcopy(network), graph)
    inputs = _inputs(folded, x)
    uses = Counter(node.target for node in inputs)
    notes = []
    for node, given in inputs.items():
        module, before = folded.get_submodule(str(node.target)), node.all_input_nodes[0]
        layer = _layer_before(folded, node, given, uses)
        form = _affine(module, given) if layer is not None else None
        if layer is not None and form is not None:
            _put_into(layer, *form)
            node.replace_all_uses_with(before)
            graph.erase_node(node)
            notes.append(f"{node.target} is folded into {before.target}")
        elif not isinstance(module, LAYERS) and type(module).__module__ not in NO_NORMS:
            notes.append(
                f"{node.target}, a {type(module).__name__}, has no affine form in evaluation: "
                "exported as it is"
            )
    folded.delete_all_unused_submodules()
    folded.recompile()
    return folded, notes


class _Tracer(fx.Tracer):
    """Traces into modules that hold layers. A norm is a leaf, whatever it is made of."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, LAYERS) or not any(isinstance(part, LAYERS) for part in m.modules())


def _inputs(traced: fx.GraphModule, x: Tensor) -> dict[fx.Node, Tensor]:
    """Return the calls of modules in execution order, each with its input before any folding."""
    interpreter = fx.Interpreter(traced, garbage_collect_values=False)
    interpreter.run(x)
    called = [node for node in traced.graph.nodes if node.op == "call_module"]
    return {node: interpreter.env[node.all_input_nodes[0]] for node in called}


def _layer_before(
    folded: fx.GraphModule, node: fx.Node, given: Tensor, uses: Counter[fx.node.Target]
) -> nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | None:
    """Return the layer whose output goes into this call and nowhere else; None without one."""
    before = node.all_input_nodes[0]
    if before.op != "call_module":
        return None
    layer = folded.get_submodule(str(before.target))
    is_alone = len(before.users) == uses[before.target] == 1
    if isinstance(layer, LAYERS) and is_alone and given.dim() == layer.weight.dim():
        return layer
    return None


def _affine(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return a and b of module(x) = a * x + b, float64 (C,).

    None if that does not hold on x, (N, C, ...), and on random input.
    """

    def per_channel(t: Tensor) -> Tensor:
        return t.transpose(0, 1).flatten(1).double()  # (C, values)

    module, x = copy.deepcopy(module).double(), x.double()
    # Probes are as large as x or larger: a norm may compute in float32, and rounding near 0 could
    # then look like another map.
    size = float(x.abs().max().clamp(min=1))
    random = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    try:
        b = per_channel(module(torch.zeros_like(x)))[:, :1]
        a = (per_channel(module(torch.full_like(x, size)))[:, :1] - b) / size
        for probe in (x, *(random * size * scale for scale in (1, 30, 1000))):
            y, values = module(probe), per_channel(probe)
            allowed = TOLERANCE * (a.abs() * values.abs().amax(1, keepdim=True) + b.abs())
            is_close = (per_channel(y) - (a * values + b)).abs() <= allowed  # False for NaN
            if y.shape != x.shape or not bool(is_close.all()):
                return None
    except Exception:  # a module that cannot be probed, for whatever reason, cannot be folded
        return None
    return a.flatten(), b.flatten()


def _put_into(layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d, a: Tensor, b: Tensor) -> None:
    """Make the layer return a * y + b, where it returned y."""
    weight = layer.weight.double() * a.view(-1, *[1] * (layer.weight.dim() - 1))
    bias = b if layer.bias is None else layer.bias.double() * a + b
    dtype = layer.weight.dtype
    layer.weight, layer.bias = (nn.Parameter(t.to(dtype), False) for t in (weight, bias))
