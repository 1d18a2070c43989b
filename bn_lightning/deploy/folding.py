"""Folding of normalization layers into the layers before them.

A module of any class can be folded if it is an affine map per channel, y = a * x + b.
Batch normalization in eval mode is such a map. This property is tested numerically, and
does not depend on the class of the module.
"""

import copy
from collections import Counter

import torch
from torch import Tensor, fx, nn

from bn_lightning.errors import describe_error

# Layers that a module can be folded into. Their weights are (C, ...), for C output
# channels.
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Modules whose classes are defined in these files of torch are never norms. The notes
# do not mention them.
NO_NORMS = {f"torch.nn.modules.{kind}" for kind in ("activation", "pooling", "dropout", "flatten")}
# Tolerance of the numerical test, relative to the largest values of each channel.
TOLERANCE = 1e-5

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


@torch.no_grad()
def fold(network: nn.Module, x: Tensor) -> tuple[nn.Module, list[str]]:
    """Fold each module that is an affine map per channel into the layer directly before it.

    Each module is tested with its own input for the batch `x`, and with random input.

    Args:
        network: a network in eval mode. It is not changed.
        x: a batch of the network's input.

    Returns:
        The folded network and notes for the user. There is one note for each folded
        module, and one for each module that could be a norm but is not folded. If
        torch.fx cannot trace the network, the unchanged network and one note are
        returned.
    """
    try:
        graph = _Tracer().trace(network)
    except Exception as error:
        # Tracing runs the network's own code, which may raise any exception.
        reason = describe_error(error)
        return network, [f"nothing is folded: torch.fx cannot trace the network ({reason})"]
    folded = fx.GraphModule(copy.deepcopy(network), graph)
    inputs = _module_inputs(folded, x)
    uses = Counter(node.target for node in inputs)
    notes = []
    for node, module_input in inputs.items():
        module = folded.get_submodule(str(node.target))
        before = node.all_input_nodes[0]
        layer = _layer_before(folded, node, module_input, uses)
        affine = _affine_map(module, module_input) if layer is not None else None
        if layer is not None and affine is not None:
            _fold_into(layer, *affine)
            node.replace_all_uses_with(before)
            graph.erase_node(node)
            notes.append(f"{node.target} is folded into {before.target}")
        elif not isinstance(module, LAYERS) and type(module).__module__ not in NO_NORMS:
            reason = (
                "there is no layer that it can be folded into"
                if layer is None
                else "in eval mode, it is not an affine map per channel"
            )
            notes.append(f"{node.target} ({type(module).__name__}) is not folded: {reason}")
    folded.delete_all_unused_submodules()
    folded.recompile()
    return folded, notes


class _Tracer(fx.Tracer):
    """A tracer that traces into a module only if it contains one of `LAYERS`.

    A norm is therefore always a leaf of the graph.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, LAYERS) or not any(isinstance(part, LAYERS) for part in m.modules())


def _module_inputs(traced: fx.GraphModule, x: Tensor) -> dict[fx.Node, Tensor]:
    """Return the input of each module call, in execution order, before any folding."""
    interpreter = fx.Interpreter(traced, garbage_collect_values=False)
    interpreter.run(x)
    calls = [node for node in traced.graph.nodes if node.op == "call_module"]
    return {node: interpreter.env[node.all_input_nodes[0]] for node in calls}


def _layer_before(
    folded: fx.GraphModule, node: fx.Node, module_input: Tensor, uses: Counter[fx.node.Target]
) -> Layer | None:
    """Return the layer directly before a module call, or None.

    The layer must be called once, and its output must be used only by this call.
    """
    before = node.all_input_nodes[0]
    if before.op != "call_module":
        return None
    layer = folded.get_submodule(str(before.target))
    is_only_use = len(before.users) == uses[before.target] == 1
    if isinstance(layer, LAYERS) and is_only_use and module_input.dim() == layer.weight.dim():
        return layer
    return None


def _affine_map(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return a and b, float64 (C,), such that module(x) = a * x + b.

    Return None unless the equation holds both for `x`, (N, C, ...), and for random
    input.
    """

    def by_channel(t: Tensor) -> Tensor:
        return t.transpose(0, 1).flatten(1).double()  # (C, values)

    module, x = copy.deepcopy(module).double(), x.double()
    # The random probes are about as large as x, or larger. Near 0, the rounding errors
    # of a norm that computes in float32 could exceed the tolerance.
    size = float(x.abs().max().clamp(min=1))
    random = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    probes = (x, *(random * size * scale for scale in (1, 30, 1000)))
    try:
        b = by_channel(module(torch.zeros_like(x)))[:, :1]
        a = (by_channel(module(torch.full_like(x, size)))[:, :1] - b) / size
        for probe in probes:
            # A module such as an in-place ReLU changes its input.
            y, values = module(probe.clone()), by_channel(probe)
            allowed = TOLERANCE * (a.abs() * values.abs().amax(1, keepdim=True) + b.abs())
            is_close = (by_channel(y) - (a * values + b)).abs() <= allowed  # False for NaN
            if y.shape != x.shape or not bool(is_close.all()):
                return None
    except Exception:
        # A module that raises any exception for a probe is not folded.
        return None
    return a.flatten(), b.flatten()


def _fold_into(layer: Layer, a: Tensor, b: Tensor) -> None:
    """Change the parameters of a layer so that it returns a * y + b instead of y."""
    weight = layer.weight.double() * a.view(-1, *[1] * (layer.weight.dim() - 1))
    bias = b if layer.bias is None else layer.bias.double() * a + b
    dtype = layer.weight.dtype
    layer.weight, layer.bias = (nn.Parameter(t.to(dtype), False) for t in (weight, bias))
