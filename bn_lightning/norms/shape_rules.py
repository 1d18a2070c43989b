"""Rules on the shapes that a network may ask a norm for."""

from collections.abc import Collection

from bn_lightning.errors import UserError

NUM_DIMS = (2, 3, 4, 5)


def require_num_dims(norm: str, num_dims: int | None, allowed: Collection[int] = NUM_DIMS) -> None:
    """Check the number of dimensions for which a network builds a norm.

    Args:
        norm: the name of the norm for the error message.

    Raises:
        UserError: `num_dims` is not in `allowed`.
    """
    if num_dims not in allowed:
        raise UserError(
            f"The norm {norm!r} was asked for num_dims {num_dims}; it must be one of "
            f"{', '.join(map(str, allowed))}.\n"
            "num_dims is 2 behind a linear layer, and 3, 4 or 5 behind a 1-, 2- or 3-dimensional "
            "convolution. Correct it where the network calls norm(num_features, num_dims)."
        )


def require_several_channels(norm: str, num_features: int, place: str) -> None:
    """Check that a norm over channels has more than one.

    Args:
        norm: the name of the norm for the error message.
        place: where the norm needs them, such as `behind a linear layer`.

    Raises:
        UserError: there is one channel.
    """
    if num_features < 2:
        raise UserError(
            f"The norm {norm!r} needs at least 2 channels {place}, got {num_features}. "
            "Normalized, a single value no longer depends on its size.\n"
            "Give the network more channels, or use --model.norm custom or none."
        )
