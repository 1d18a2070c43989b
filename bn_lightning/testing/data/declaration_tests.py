"""Tests of what a data module declares: shapes, types, classes and identity."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from bn_lightning.testing.data.base import NOUNS, LoaderTests
from bn_lightning.testing.data.contents import recorded
from bn_lightning.testing.data.source import quiet
from bn_lightning.testing.failures import describe, fail, shown


class DeclarationTests(LoaderTests):
    """The data are as the data module declares them, and two data modules declare the same."""

    def test_batches_have_the_declared_shape_and_type(self) -> None:
        found, name = self.still(), self.data_name()
        first_stage, first = next(found.batches())
        for stage, batch in found.batches():
            for what in ("inputs", "targets"):
                expected, kinds = getattr(first, what), getattr(batch, what)
                if kinds != expected:
                    fail(
                        f"The {what} of a {NOUNS[stage]} batch are {shown(kinds)}, but those of "
                        f"the first {NOUNS[first_stage]} batch are {shown(expected)}.",
                        f"{name}.{stage}_dataloader, and the preprocessing.",
                    )
        inputs = first.inputs[0]
        for attribute, (axes, value) in _declared_shape(found.stated).items():
            if inputs.shape[axes] != value:
                fail(
                    f"{name}.{attribute} is declared as {found.stated[attribute]}, but the inputs "
                    f"of the network have the shape (N, {shown(inputs.shape)}).",
                    f"the attribute {attribute} of {name}, for which the network is built, and "
                    "the shape that the loaders return.",
                )

    def test_labels_are_those_of_the_named_classes(self) -> None:
        found, name = self.still(), self.data_name()
        number, classes = found.stated.get("num_classes"), found.classes
        if classes is None and number is None:
            pytest.skip("The data have no classes.")
        if classes is None:
            fail(
                f"{name} declares {number} classes, but `classes`, their names, is None.",
                f"{name}.classes. Tables, `predict` and exported files show the names.",
            )
        if len(set(classes)) != (number or len(classes)):
            fail(
                f"There are {number or len(classes)} classes, but {len(set(classes))} different "
                "names of classes.",
                f"{name}.num_classes and {name}.classes.",
            )
        for stage, batch in found.batches():
            if batch.labels is None:
                pytest.skip("The targets are not one label for each sample.")
            if batch.targets[0].dtype != "int64":
                fail(
                    f"The {NOUNS[stage]} labels have the type {batch.targets[0].dtype}; labels "
                    "must be int64.",
                    f"{name}.setup. Convert them with labels.long().",
                )
            wrong = [label for label in batch.labels if not 0 <= label < len(classes)]
            if wrong:
                lowest = min(label for _, batch in found.batches() for label in batch.labels or ())
                hint = " They seem to start at 1: subtract 1." if lowest == 1 else ""
                fail(
                    f"The {NOUNS[stage]} label {wrong[0]} does not exist: there are "
                    f"{len(classes)} names of classes, so labels are from 0 to "
                    f"{len(classes) - 1}.{hint}",
                    f"{name}.setup, or the function that returns the labels.",
                )

    def test_values_are_finite(self) -> None:
        found = self.still()
        for stage, passes in found.passes.items():
            position, bad = 0, []
            for batch in passes[0] if passes else []:
                bad += [position + index for index in batch.not_finite]
                position += len(batch.samples)
            if bad:
                fail(
                    f"{len(bad):,} of {position:,} {NOUNS[stage]} samples contain NaN or infinite "
                    f"values, at these positions of {self.data_name()}.{stage}_dataloader: "
                    f"{shown(bad)}.",
                    "missing values in the data, and a division by a standard deviation of 0 in "
                    "the preprocessing.",
                )

    def test_the_network_accepts_a_batch(self) -> None:
        batch = self.still().first
        with quiet():
            cli = self.build("--trainer.devices", "1")
            task = cli.model.eval()
            # A step may ask the trainer for the number of processes.
            task.trainer = cli.trainer
            try:
                with torch.no_grad():
                    task.step(batch, "train")
            except Exception as error:
                kinds = recorded(batch)
                fail(
                    f"{type(task).__name__}.step fails for the first training batch, with inputs "
                    f"{shown(kinds.inputs)} and targets {shown(kinds.targets)}: {describe(error)}",
                    f"what {self.data_name()} declares for the network, and the types of inputs "
                    "and targets.",
                )

    def test_two_data_modules_declare_the_same_data(self) -> None:
        found, again = self.still(), self.still_again()
        name, counts = self.data_name(), found.class_counts
        try:
            json.dumps(found.identity)
        except (TypeError, ValueError) as error:
            fail(f"A checkpoint cannot contain the identity: {error}.", f"{name}.identity().")
        if found.identity != again.identity:
            fail(
                f"{name}.identity() differs between two data modules with the same settings, so "
                f"no run could be resumed.\n{found.identity}\n{again.identity}",
                f"random numbers and the time in {name}.setup and the function of the data.",
            )
        if counts != again.class_counts:
            fail(
                f"{name}.class_counts() differs between two data modules with the same settings: "
                f"{counts} and {again.class_counts}.",
                f"{name}.setup.",
            )
        labels = [label for batch in found.passes["train"][0] for label in batch.labels or []]
        # Other tests report samples that are not read, and labels out of range.
        is_complete = Counter(found.samples("train")) == Counter(found.loaders["train"].samples)
        if counts is None or not is_complete:
            return
        read = [labels.count(label) for label in range(len(counts))]
        if sum(read) == len(labels) and read != counts:
            fail(
                f"{name}.class_counts() is {counts}, but in an epoch the training loader returns "
                f"{read} samples of the classes.",
                f"{name}.class_counts, which must count the labels of the training samples only.",
            )


def _declared_shape(stated: Mapping[str, Any]) -> dict[str, tuple[slice, tuple[int, ...]]]:
    """Return the axes of an input, without the batch dimension, that an attribute declares."""
    declared: dict[str, tuple[slice, tuple[int, ...]]] = {}
    if "image_size" in stated:
        declared["image_size"] = slice(-2, None), tuple(stated["image_size"])
    if "in_channels" in stated:
        declared["in_channels"] = slice(0, 1), (stated["in_channels"],)
    return declared
