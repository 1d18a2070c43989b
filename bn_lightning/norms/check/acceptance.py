"""Which inputs a norm accepts."""

import torch
from torch import Tensor

from bn_lightning.errors import describe_error
from bn_lightning.norms.check import determination, inputs
from bn_lightning.norms.check.kinds import Kind
from bn_lightning.norms.check.subject import Builder, Case

# The numbers of channels to try. Group normalization needs a multiple of its groups.
FEATURES = (6, 8, 12, 16, 32, 64, 96, 128, 256)


class NotANorm(Exception):
    """The output of a layer is no tensor with the shape of its input."""


class ShapeError(Exception):
    """A layer accepts inputs only if some of their sizes are equal."""


def accepted(build: Builder, num_dims: int) -> Kind:
    """Return a kind with the first number of channels and dtype that the norm accepts.

    Raises:
        NotANorm: the output has another shape than the input.
        ShapeError: the norm accepts only inputs whose positions have certain sizes.
        Exception: that of the layer, if it raises for every input.
    """
    first_error: Exception | None = None
    for dtype in (torch.float64, torch.float32):
        for features in FEATURES:
            kind = Kind(num_dims, features, dtype, state_is_fixed=True)
            error = _error(build, kind, inputs.POSITIONS[num_dims])
            if error is None:
                return kind
            first_error = first_error or error
    assert first_error is not None
    if num_dims > 2:
        _refuse_special_sizes(build, num_dims, first_error)
    raise first_error


def _error(build: Builder, kind: Kind, positions: tuple[int, ...]) -> Exception | None:
    """Return the error of a layer in both modes, or None if one of them accepts the input.

    Raises:
        NotANorm: the output has another shape than the input.
    """
    error: Exception | None = None
    for training in (True, False):
        case = Case(build, kind, (10, kind.features, *positions), training, kind.dtype)
        try:
            y = case.new_layer()(case.x)
        except Exception as raised:
            error = error or raised
            continue
        if not isinstance(y, Tensor) or y.shape != case.shape:
            found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise NotANorm(f"for input of shape {case.shape}, it returns {found}.")
        return None
    return error


def _refuse_special_sizes(build: Builder, num_dims: int, error: Exception) -> None:
    """Raise a ShapeError if the norm accepts square inputs, or as many positions as channels.

    A layer for the last dimension, such as a norm of transformers, accepts inputs whose last
    size is the number of channels. That is no error: it treats dimension 1 as it treats the
    samples or the other positions.
    """
    kind = Kind(num_dims, FEATURES[0], state_is_fixed=True)
    usual = inputs.POSITIONS[num_dims]
    special = [(5,) * len(usual), (*usual[:-1], kind.features)]
    for positions in special:
        if _error(build, kind, positions) is not None:
            continue
        case = Case(build, kind, (10, kind.features, *positions), True, kind.dtype)
        samples, channels, *others = determination.groups(case).labels
        pattern = others[0] if num_dims > 3 else samples
        is_for_last_dimension = (len(set(channels)) > 1) == (len(set(pattern)) > 1)
        if positions[-1] != kind.features or not is_for_last_dimension:
            shapes = [(10, kind.features, *sizes) for sizes in (positions, usual)]
            raise ShapeError(
                f"{describe_error(error)} for input of shape {shapes[1]}, but accepts {shapes[0]}. "
                "Check the order of the axes: sizes that happen to be equal hide a wrong one."
            )
