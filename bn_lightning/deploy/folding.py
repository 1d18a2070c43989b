"""Folding of normalization layers into the layers before them.

A module of any class can be folded if it is an affine map per channel, y = a * x + b.
Batch normalization in eval mode is such a map. This property is tested numerically, and
does not depend on the class of the module. The layer after folding is tested in the
same way, so a norm is left if the weight of its layer is computed, for example.
"""

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn

from bn_lightning.errors import describe_error
from bn_lightning.norms import recognition

# Layers that a module can be folded into. Their weights are (C, ...), for C output
# channels.
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Modules whose classes are defined in these files of torch are never norms. The notes
# do not mention them.
NO_NORMS = {f"torch.nn.modules.{kind}" for kind in ("activation", "pooling", "flatten")}
# Tolerance of the numerical tests, relative to the largest values of each channel.
TOLERANCE = 1e-5
# More notes of one kind than this are replaced by their number.
MAX_NOTES = 8

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
Affine = tuple[Tensor, Tensor]  # a and b, float64 (C,)


@torch.no_grad()
def fold(network: nn.Module, x: Tensor) -> tuple[nn.Module, list[str]]:
    """Fold each module that is an affine map per channel into the layer directly before it.

    Each module is tested with its own input for the batch `x`, and with random input.
    Modules that return their input, such as dropout in eval mode, are removed.

    Args:
        network: a network in eval mode. It is not changed.
        x: a batch of the network's input.

    Returns:
        The folded network and notes for the user, on the modules that are folded and on
        those that could be norms but are not folded. If torch.fx cannot trace the
        network, the unchanged network and one note are returned.
    """
    try:
        graph = _Tracer().trace(network)
        folded = fx.GraphModule(copy.deepcopy(network), graph)
        measured = _Measurement(folded)
        measured.run(x)
    except Exception as error:
        # Tracing runs the network's own code, which may raise any exception.
        reason = describe_error(error)
        return network, [f"nothing is folded: torch.fx cannot trace the network ({reason})"]
    uses = Counter(_owner(node) for node in graph.nodes)
    done: list[str] = []
    left: dict[tuple[str, str], list[str]] = {}
    for node, affine in measured.affine.items():
        before, name = node.all_input_nodes[0], str(node.target)
        if node in measured.identities:
            node.replace_all_uses_with(before)
            graph.erase_node(node)
            continue
        reason = "there is no layer that it can be folded into"
        layer = _layer_before(folded, node, measured.shapes, uses)
        if layer is not None and affine is None:
            reason = "in eval mode, it is not an affine map per channel"
        elif layer is not None and affine is not None:
            new_layer = _fold_into(layer, *affine, measured.shapes[before])
            if new_layer is not None:
                folded.set_submodule(str(before.target), new_layer)
                node.replace_all_uses_with(before)
                graph.erase_node(node)
                done.append(f"{name} is folded into {before.target}")
                continue
            reason = f"{before.target} does not use its weight and bias directly"
        kind = type(folded.get_submodule(name)).__name__
        left.setdefault((kind, reason), []).append(name)
    folded.delete_all_unused_submodules()
    folded.recompile()
    return folded, _notes(done, left)


class _Tracer(fx.Tracer):
    """A tracer that does not trace into `LAYERS`, nor into modules that contain none of them.

    A norm is therefore a leaf of the graph, except for the parts of an `nn.Sequential`.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, LAYERS) or super().is_leaf_module(m, module_qualified_name):
            return True
        is_sequential = type(m).forward is nn.Sequential.forward
        return not is_sequential and not _contains_layers(m)


class _Measurement(fx.Interpreter):
    """A run of a traced network that tests the modules as they are called.

    Attributes:
        affine: the affine map of each call of a module that could be a norm, or None.
        identities: the calls among them that return their input.
        shapes: the shape of the input of each call of one of `LAYERS`.
    """

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.affine: dict[fx.Node, Affine | None] = {}
        self.identities: set[fx.Node] = set()
        self.shapes: dict[fx.Node, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        arguments = [*n.args, *n.kwargs.values()]
        if n.op != "call_module" or arguments != n.all_input_nodes:
            return super().run_node(n)
        module, x = self.fetch_attr(str(n.target)), self.env[n.all_input_nodes[0]]
        if isinstance(module, LAYERS):
            self.shapes[n] = x.shape
            return super().run_node(n)
        # The module may change its input in place.
        before = x.clone() if isinstance(x, Tensor) else None
        y = super().run_node(n)
        if before is not None and isinstance(y, Tensor) and _could_be_norm(module, before, y):
            self.affine[n] = affine = _affine_map(module, before)
            if y is x and affine is not None and _is_identity(*affine):
                self.identities.add(n)
        return y


def _could_be_norm(module: nn.Module, x: Tensor, y: Tensor) -> bool:
    is_other = type(module).__module__ in NO_NORMS or isinstance(module, recognition.NO_NORMS)
    return not is_other and not _contains_layers(module) and y.shape == x.shape and x.dim() > 1


def _contains_layers(module: nn.Module) -> bool:
    return any(isinstance(part, LAYERS) for part in module.modules())


def _owner(node: fx.Node) -> str:
    """Return the module that a node calls, or whose parameter it reads."""
    name = str(node.target)
    return name.rpartition(".")[0] if node.op == "get_attr" else name


def _is_identity(a: Tensor, b: Tensor) -> bool:
    return bool((a == 1).all() and (b == 0).all())


def _layer_before(
    folded: fx.GraphModule,
    node: fx.Node,
    shapes: dict[fx.Node, torch.Size],
    uses: Counter[str],
) -> Layer | None:
    """Return the layer directly before a module call, or None.

    The layer must be called once, and its output must be used only by this call.
    """
    before = node.all_input_nodes[0]
    is_only_use = len(before.users) == uses[str(before.target)] == 1
    if before not in shapes or not is_only_use:
        return None
    layer: Layer = folded.get_submodule(str(before.target))  # type: ignore[assignment]
    # Dimension 1 must be that of the channels.
    return layer if len(shapes[before]) == layer.weight.dim() else None


def _affine_map(module: nn.Module, x: Tensor) -> Affine | None:
    """Return a and b, float64 (C,), such that module(x) = a * x + b.

    Return None unless the equation holds both for `x`, (N, C, ...), and for random
    input.
    """
    module, x = copy.deepcopy(module).double(), x.double()
    # The random probes are about as large as x, or larger. Near 0, the rounding errors
    # of a norm that computes in float32 could exceed the tolerance.
    size = float(x.abs().max().clamp(min=1))
    random = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    probes = (x, *(random * size * scale for scale in (1, 30, 1000)))
    try:
        b = _by_channel(module(torch.zeros_like(x)))[:, :1]
        a = (_by_channel(module(torch.full_like(x, size)))[:, :1] - b) / size
        for probe in probes:
            # The module may change its input in place.
            y, values = module(probe.clone()), _by_channel(probe)
            allowed = TOLERANCE * (a.abs() * values.abs().amax(1, keepdim=True) + b.abs())
            is_close = (_by_channel(y) - (a * values + b)).abs() <= allowed  # False for NaN
            if y.shape != x.shape or not bool(is_close.all()):
                return None
    except Exception:
        # A module that raises any exception for a probe is not folded.
        return None
    return a.flatten(), b.flatten()


def _fold_into(layer: Layer, a: Tensor, b: Tensor, shape: torch.Size) -> Layer | None:
    """Return a copy of a layer that returns a * y + b instead of y.

    Return None if the copy does not, for random input of this shape: the layer may
    compute its weight from other parameters.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *shape[1:], dtype=torch.float64, generator=generator)
    try:
        y = _by_channel(copy.deepcopy(layer).double()(x))
        new = copy.deepcopy(layer)
        weight = layer.weight.double() * a.view(-1, *[1] * (layer.weight.dim() - 1))
        bias = b if layer.bias is None else layer.bias.double() * a + b
        dtype = layer.weight.dtype
        new.weight, new.bias = (nn.Parameter(t.to(dtype), False) for t in (weight, bias))
        found = _by_channel(copy.deepcopy(new).double()(x))
    except Exception:
        # A parametrized weight cannot be assigned. A subclass may raise anything.
        return None
    a, b = a[:, None], b[:, None]
    allowed = TOLERANCE * (a.abs() * y.abs().amax(1, keepdim=True) + b.abs())
    is_close = (found - (a * y + b)).abs() <= allowed
    return new if bool(is_close.all()) else None


def _by_channel(t: Tensor) -> Tensor:
    """Return a tensor (N, C, ...) as float64 (C, values)."""
    return t.transpose(0, 1).flatten(1).double()


def _notes(done: list[str], left: dict[tuple[str, str], list[str]]) -> list[str]:
    """Return a note for each module, or one for all modules of a kind if there are many.

    Args:
        done: a note for each folded module.
        left: names of the modules that are not folded, by their class and the reason.
    """
    if len(done) > MAX_NOTES:
        done = [f"{len(done)} norms are folded into the layers before them"]
    notes = [*done]
    for (kind, reason), names in left.items():
        others = ""
        if len(names) > MAX_NOTES:
            others = f", and {len(names) - 1} others like it"
            names = names[:1]
        notes += [f"{name} ({kind}) is not folded{others}: {reason}" for name in names]
    return notes
