"""The norm that is examined: it builds layers at random points, and the cases to examine."""

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bn_lightning.norms import registry
from bn_lightning.norms.check import inputs
from bn_lightning.norms.check.findings import NotApplicable

if TYPE_CHECKING:
    from bn_lightning.norms.check.kinds import Kind

# The batch sizes of the cases, smallest first. A layer may split a batch into virtual batches of
# 4, 8 or more samples: then no part has one sample only, which batch normalization rejects.
BATCH_SIZES = (2, 12)


@dataclass(frozen=True)
class Builder:
    """Builds layers of a norm. It can be sent to another process.

    Attributes:
        norm: a class or function, called as norm(num_features=..., num_dims=...).
        name: its name for messages.
        norm_args: further arguments.
    """

    norm: Callable[..., nn.Module]
    name: str
    norm_args: dict[str, Any]

    def __call__(self, num_features: int, num_dims: int, **arguments: Any) -> nn.Module:
        """Build a layer with its initial parameters. The global random state stays as it was."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            arguments = self.norm_args | arguments
            return registry.build(self.norm, self.name, num_features, num_dims, arguments)

    def accepts(self, argument: str) -> bool:
        return argument in inspect.signature(self.norm).parameters


@dataclass(frozen=True)
class Case:
    """An input of a certain shape and dtype, in one mode, and layers for it.

    Attributes:
        kind: the kind of the layer for this number of dimensions.
        shape: of the input, (N, C) or (N, C, ...).
        seed: of all random values.
    """

    build: Builder
    kind: "Kind"
    shape: tuple[int, ...]
    training: bool
    dtype: torch.dtype
    seed: int = 0

    @property
    def tolerance(self) -> float:
        """Return the accepted difference, which follows the dtype in which the layer computes."""
        return max(TOLERANCES[self.dtype], TOLERANCES[self.kind.computes_in])

    @property
    def x(self) -> Tensor:
        return inputs.batch(self.shape, self.seed).to(self.dtype)

    @property
    def gradient(self) -> Tensor:
        """Return a random gradient of the output."""
        return inputs.random(self.shape, self.seed + 50).to(self.dtype)

    def new_layer(self, **arguments: Any) -> nn.Module:
        """Build a layer with its initial parameters and state."""
        layer = self.build(self.kind.features, self.kind.num_dims, **arguments)
        return layer.to(self.dtype).train(self.training)

    def untrained_layer(self, **arguments: Any) -> nn.Module:
        """Build a layer with random parameters and its initial state."""
        layer = self.new_layer(**arguments)
        inputs.randomize_parameters(layer, self.seed)
        return layer

    def layer(self, past: int | None = None, **arguments: Any) -> nn.Module:
        """Build a layer with random parameters and state. Equal calls give equal layers.

        Args:
            past: the seed of the batches with which its running statistics were updated.
        """
        layer = self.untrained_layer(**arguments)
        past = self.seed if past is None else past
        if self.kind.state_is_fixed:
            inputs.randomize_buffers(layer, past + 1)
        else:
            layer.train()
            for x in self.past_batches(past):
                layer(x)
        if self.kind.reads_past:
            inputs.end_warm_up(layer)
        return layer.train(self.training)

    def past_batches(self, past: int | None = None) -> list[Tensor]:
        """Return the batches with which `layer` updates the running statistics."""
        past = self.seed if past is None else past
        return [
            inputs.batch((14, *self.shape[1:]), 1000 * past + i, scale=1.5).to(self.dtype)
            for i in (1, 2)
        ]

    def __str__(self) -> str:
        mode = "training" if self.training else "evaluation"
        return f"input {self.shape}, {str(self.dtype).removeprefix('torch.')}, {mode}"


TOLERANCES = {
    torch.float64: 1e-7,
    torch.float32: 2e-4,
    torch.float16: 1.5e-2,
    torch.bfloat16: 8e-2,
}


class Norm:
    """A norm with its kinds, one for each number of dimensions.

    Attributes:
        kinds: by number of dimensions.
        rejected: the error for each number of dimensions that the norm does not accept.
        required: the numbers of dimensions that it must accept.
        case: the case that is being examined. Reports of failures show it.
    """

    def __init__(
        self,
        build: Builder,
        kinds: dict[int, "Kind"],
        rejected: dict[int, Exception],
        required: frozenset[int],
    ) -> None:
        self.build, self.kinds, self.rejected, self.required = build, kinds, rejected, required
        self.case: Case | None = None

    @property
    def one_kind(self) -> "Kind":
        """Return the kind for images, or for the most dimensions: for what takes seconds."""
        return self.kinds.get(4) or list(self.kinds.values())[-1]

    def cases(
        self,
        *,
        training: Collection[bool] = (True, False),
        dtype: torch.dtype | None = None,
        batch_sizes: Iterable[int] = BATCH_SIZES,
        only: Callable[["Kind"], bool] = lambda kind: True,
        otherwise: str = "",
    ) -> Iterator[Case]:
        """Yield cases for each number of dimensions, the smallest first.

        Args:
            dtype: of the input and the layer. The default is float64 if the layer accepts
                it.
            only: which kinds are examined.
            otherwise: the reason for n/a if no kind is.

        Raises:
            NotApplicable: no kind is examined.
        """
        kinds = [kind for kind in self.kinds.values() if only(kind)]
        if not kinds:
            raise NotApplicable(otherwise)
        for kind in kinds:
            for mode in (True, False):
                if mode not in training:
                    continue
                for size in batch_sizes:
                    yield self.one_case(kind, size, mode, dtype)

    def one_case(
        self, kind: "Kind", size: int, training: bool, dtype: torch.dtype | None = None
    ) -> Case:
        """Return a case, which becomes the one that is being examined."""
        shape = (size, kind.features, *inputs.POSITIONS[kind.num_dims])
        self.case = Case(self.build, kind, shape, training, dtype or kind.dtype)
        return self.case
