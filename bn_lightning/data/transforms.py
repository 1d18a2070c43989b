"""Random transforms of training images, by their names in torchvision.

They are applied to one image at a time, so that the random numbers of a sample depend
only on seed, epoch and index of the sample.
"""

import inspect
from collections.abc import Sequence
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from bn_lightning import lookup
from bn_lightning.errors import UserError, describe_error
from bn_lightning.training import seeds
from bn_lightning.training.batches import Augment

KNOWN: dict[str, type] = lookup.classes_in(v2, v2.Transform)
NEEDS_SEVERAL_SAMPLES = ("CutMix", "MixUp")

EXAMPLE = """\
A correct example:
  --data.augment '[{"name": "RandomRotation", "args": {"degrees": 10}}, {"name": "RandomErasing"}]'
All transforms: https://docs.pytorch.org/vision/stable/transforms.html"""


class Transforms:
    """A sequence of transforms of `torchvision.transforms.v2`.

    Args:
        settings: a list of transforms, each `{"name": NAME, "args": {...}}`. An argument
            `transforms`, as of `RandomApply`, is such a list too.
        image_shape: shape of a raw image, (H, W) or (C, H, W).
        may_resize: whether the transforms may change the size of the images, because
            they are resized afterwards.

    Raises:
        UserError: the settings are invalid. The transforms change shape or type of an
            image, fail, or give different results with the same random numbers.
    """

    def __init__(self, settings: Any, image_shape: Sequence[int], may_resize: bool = False) -> None:
        self.transform = v2.Compose(_build_all(settings))
        self.may_resize = may_resize
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(256, (16, *image_shape), dtype=torch.uint8, generator=generator)
        sample_seeds = seeds.of_samples(len(noise), 0, 0)
        # A transform may work in place.
        result = self.apply(noise.clone(), sample_seeds)
        if not torch.equal(self.apply(noise.flip(0), sample_seeds.flip(0)).flip(0), result):
            raise UserError(
                "The transforms of --data.augment give different results with the same random "
                "numbers of torch. A resumed run would differ. Remove the transform that keeps a "
                f"state or has other random numbers: {self._names()}."
            )

    def of_epoch(self, num_images: int, seed: int, epoch: int) -> Augment:
        """Return the augmentation of one epoch, for a data set of `num_images` images."""
        return partial(self._augment, seeds.of_samples(num_images, seed, epoch))

    def _augment(self, sample_seeds: Tensor, images: Tensor, indices: Tensor) -> Tensor:
        return self.apply(images, sample_seeds[indices.cpu()])

    def apply(self, images: Tensor, sample_seeds: Tensor) -> Tensor:
        """Transform images, uint8 (B, H, W) or (B, C, H, W), each with its own seed (B,).

        The global generators are not changed.
        """
        is_grey = images.ndim == 3
        # On the CPU, the random numbers do not depend on the device of the images.
        inputs = images.cpu().unsqueeze(1) if is_grey else images.cpu()
        results: list[Tensor] = []
        size = None if self.may_resize else images.shape[-2:]
        with torch.random.fork_rng(devices=()):
            for image, seed in zip(inputs, sample_seeds.tolist(), strict=True):
                # torch.manual_seed takes 0.5 ms if CUDA has not been initialized.
                torch.default_generator.manual_seed(seed)
                result = self._transform_one(image)
                self._refuse_other_kind(result, image, size)
                if size is None:
                    size = result.shape[-2:]
                results.append(result)
        batch = torch.stack(results)
        return (batch.squeeze(1) if is_grey else batch).to(images.device)

    def _transform_one(self, image: Tensor) -> Any:
        try:
            return self.transform(image)
        except Exception as error:
            raise UserError(
                f"The transforms of --data.augment ({self._names()}) fail for an image "
                f"{_described(image)}: {describe_error(error)}\n{EXAMPLE}"
            ) from error

    def _refuse_other_kind(self, result: Any, image: Tensor, size: torch.Size | None) -> None:
        """Refuse a result that does not fit the network, or the other results of the batch.

        Args:
            size: the required height and width; None for any.
        """
        is_image = isinstance(result, Tensor) and result.dtype == image.dtype
        if is_image and result.shape[:-2] == image.shape[:-2] and size in (None, result.shape[-2:]):
            return
        *_, height, width = image.shape
        raise UserError(
            f"The transforms of --data.augment ({self._names()}) turn an image, "
            f"{_described(image)}, into {_described(result)}. Images must keep their type and "
            "shape, because the images of the evaluation are not augmented.\n"
            f"Set the size in the arguments to [{height}, {width}], or resize all images with "
            "--data.resize; then the results may have another size, the same for all. Do not "
            "convert or normalize pixels here: preprocessing does so."
        )

    def _names(self) -> str:
        return ", ".join(type(transform).__name__ for transform in self.transform.transforms)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return f"an object of type {type(value).__name__}"


def _build_all(settings: Any) -> list[Any]:
    if not isinstance(settings, list) or not settings:
        raise UserError(f"augment is {settings!r}; it must be a list of transforms.\n{EXAMPLE}")
    return [_build(setting) for setting in settings]


def _build(setting: Any) -> Any:
    """Build one transform. Nothing is imported."""
    fields = setting if isinstance(setting, dict) else {}
    args = fields.get("args") or {}
    if "name" not in fields or fields.keys() - {"name", "args"} or not isinstance(args, dict):
        raise UserError(
            f"augment contains {setting!r}; each transform must have a `name`, may have `args`, "
            f"which are its arguments by name, and has no other key.\n{EXAMPLE}"
        )
    name = str(fields["name"])
    if name not in KNOWN:
        near = lookup.similar(name.rpartition(".")[2], list(KNOWN))
        hint = f" Similar names: {', '.join(near)}." if near else ""
        raise UserError(
            f"augment contains the unknown transform {name!r}.{hint} Only names of classes in "
            f"torchvision.transforms.v2 are accepted, without a module.\n{EXAMPLE}"
        )
    if name in NEEDS_SEVERAL_SAMPLES:
        raise UserError(
            f"augment contains {name}, which mixes several images and their labels. A transform "
            f"gets one image without its label. Remove {name}.\n{EXAMPLE}"
        )
    make = KNOWN[name]
    try:
        return make(**_converted(make, args))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"augment: {name} cannot be created with {args!r}: {describe_error(error)}\n"
            f"{lookup.describe_arguments(make, args, passed=())}\n{EXAMPLE}"
        ) from error


def _converted(make: type, args: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with transforms and enumerations instead of plain data."""
    converted = dict(args)
    if "transforms" in args:
        converted["transforms"] = _build_all(args["transforms"])
    for name, parameter in inspect.signature(make).parameters.items():
        if isinstance(parameter.default, Enum) and isinstance(args.get(name), str):
            converted[name] = type(parameter.default)(args[name])
    return converted
