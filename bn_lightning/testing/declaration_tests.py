"""Tests of what a data module declares: shapes, types, classes, preprocessing and identity."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bn_lightning.deploy.served import Served
from bn_lightning.errors import UserError, describe_error
from bn_lightning.testing.contents import Batch, digests_of, recorded
from bn_lightning.testing.data_source import Source, quiet
from bn_lightning.testing.loader_tests import NOUNS, LoaderTests, fail, identified, shown
from bn_lightning.testing.reading import NUM_KEPT, Reading, one_thread
from bn_lightning.training.data_module import DataModule


class DeclarationTests(LoaderTests):
    """The data are as the data module declares them, and two data modules declare the same."""

    def test_batches_have_the_declared_shape_and_type(self) -> None:
        found = self.still()
        for name, value in found.stated.items():
            if value is None:
                fail(f"The task needs {self.data_name()}.{name}, which is missing or None.")
        expected: Any = None
        for stage, batch in _batches(found):
            where = f"{self.data_name()}.{stage}_dataloader"
            expected = expected or (batch.inputs, batch.targets, stage)
            for what, first, kinds in zip(
                ("inputs", "targets"), expected, (batch.inputs, batch.targets), strict=False
            ):
                if kinds != first:
                    fail(
                        f"The {what} of a {NOUNS[stage]} batch are {shown(kinds)}, but those of "
                        f"the first {NOUNS[expected[2]]} batch are {shown(first)}.\nLook at "
                        f"{where} and the preprocessing."
                    )
        inputs = expected[0][0]
        if not inputs.dtype.startswith(("float", "bfloat")):
            pytest.skip("The inputs are not floating-point numbers, such as indices of tokens.")
        declared = _declared_shape(found.stated)
        for name, (axes, value) in declared.items():
            if tuple(inputs.shape[axes]) != value:
                fail(
                    f"{self.data_name()}.{name} is declared as {found.stated[name]}, but the "
                    f"inputs of the network have the shape (N, {shown(inputs.shape)}).\nThe "
                    f"network is built for the declared {name}. Correct it in "
                    f"{self.data_name()}, or change what the loaders return."
                )

    def test_labels_are_those_of_the_named_classes(self) -> None:
        found = self.still()
        number, name = found.stated.get("num_classes"), self.data_name()
        if found.classes is None:
            if number is not None:
                fail(
                    f"{name} declares {number} classes, but `classes`, their names, is None. Set "
                    "`self.classes`: tables, `predict` and exported files show the names."
                )
            pytest.skip("The data have no classes.")
        if not all(isinstance(c, str) for c in found.classes):
            fail(f"{name}.classes contains {found.classes!r}; the names must be strings.")
        if len(set(found.classes)) < len(found.classes):
            fail(f"{name}.classes contains a name twice: {found.classes!r}.")
        if number is not None and number != len(found.classes):
            fail(f"{name}.num_classes is {number}, but there are {len(found.classes)} class names.")
        for stage, batch in _batches(found):
            if batch.labels is None:
                pytest.skip("The targets are not one label for each sample.")
            kind, last = batch.targets[0].dtype, len(found.classes) - 1
            if kind != "int64":
                fail(
                    f"The {NOUNS[stage]} labels have the type {kind}; labels must be int64. "
                    f"Look at {name}.setup: convert them with labels.long()."
                )
            wrong = [label for label in batch.labels if not 0 <= label <= last]
            if wrong:
                labels = sorted({label for _, b in _batches(found) for label in b.labels or []})
                hint = " They seem to start at 1: subtract 1." if min(labels) == 1 else ""
                fail(
                    f"The {NOUNS[stage]} label {wrong[0]} does not exist: there are "
                    f"{last + 1} class names, so labels are from 0 to {last}.{hint}\n"
                    f"Look at {name}.setup, or the function that returns the labels."
                )

    def test_values_are_finite(self) -> None:
        found = self.still()
        for stage, batches in found.passes.items():
            first, bad = 0, []
            for batch in batches[0] if batches else []:
                bad += [first + position for position in batch.not_finite]
                first += len(batch.samples)
            if bad:
                fail(
                    f"{len(bad):,} of {first:,} {NOUNS[stage]} samples contain NaN or infinite "
                    f"values, at these positions of {self.data_name()}.{stage}_dataloader: "
                    f"{shown(bad)}.\nLook for missing values in the data, and for a division by a "
                    "standard deviation of 0 in the preprocessing."
                )

    def test_the_network_accepts_a_batch(self) -> None:
        found = self.still()
        with quiet(), one_thread():
            cli = self.build("--trainer.devices", "1")
            task, data = cli.model.eval(), cli.datamodule
            # A step may ask the trainer for the number of processes.
            task.trainer = cli.trainer
            try:
                with torch.no_grad():
                    step = task.step(found.first, "train")
            except Exception as error:
                kinds = recorded(found.first)
                fail(
                    f"{type(task).__name__}.step fails for the first training batch, with inputs "
                    f"{shown(kinds.inputs)} and targets {shown(kinds.targets)}:\n"
                    f"{describe_error(error)}\nLook at what {self.data_name()} declares for the "
                    "network, and at the types of inputs and targets."
                )
            if not step.loss.isfinite():
                fail(f"The loss of the first training batch is {step.loss.item()}.")
            try:
                data.trainer = cli.trainer
                data.prepare_data()
                data.setup("test")
                example = data.preprocessing(data.example_input())
            except UserError:
                return
        inputs = recorded(found.first).inputs[0]
        if tuple(example.shape[1:]) != inputs.shape:
            fail(
                f"{self.data_name()}.example_input() becomes {tuple(example.shape)} by the "
                f"preprocessing, but a batch has inputs of shape (N, {shown(inputs.shape)}). "
                "`export` traces the network with the example."
            )

    def test_preprocessing_is_the_same_in_the_loaders_export_and_predict(self) -> None:
        found = self.still()
        # `export` and `predict` construct the data module from a checkpoint.
        data = Source.of(type(self)).build()
        with quiet(), one_thread():
            try:
                data.prepare_data()
                data.setup("test")
                raw, targets = data.test_samples()
            except UserError as error:
                pytest.skip(str(error).splitlines()[0])
            except Exception as error:
                fail(
                    f"{self.data_name()} cannot be used without a trainer, as `export` does, for "
                    f"setup('test') or test_samples(): {describe_error(error)}"
                )
            served = Served(data.preprocessing, nn.Identity()).eval()
            chunks = [(raw[i : i + 256], targets[i : i + 256]) for i in range(0, len(raw), 256)]
            # Preprocessing may work in place.
            batches = [(served(inputs.clone()), labels) for inputs, labels in chunks]
        expected = [sample for batch in batches for sample in recorded(batch).samples]
        for stage, kept in (("test", found.tested), ("predict", found.predicted)):
            read = found.samples(stage)
            # Another test reports another order, and another number of samples.
            if not read or Counter(read) == Counter(expected) or len(read) != len(expected):
                continue
            values = torch.cat(kept)[:NUM_KEPT]
            now = torch.cat([inputs for inputs, _ in batches])[: len(values)]
            if _is_close(values, now):
                continue
            if Counter(identified(read, "inputs")) == Counter(identified(expected, "inputs")):
                fail(
                    f"The {NOUNS[stage]} loader returns other targets than "
                    f"{self.data_name()}.test_samples() for the same inputs."
                )
            fail(
                f"The {NOUNS[stage]} loader returns other inputs than `export` and `predict` give "
                f"to the network, which is preprocessing(test_samples()).\n"
                f"Loader: {_described(values)}\nExport:  {_described(now)}\n"
                + self._cause(data, raw[: len(values)], values)
            )

    def _cause(self, data: DataModule, raw: Tensor, values: Tensor) -> str:
        name = self.data_name()
        twice = _attempt(lambda: data.preprocessing(data.preprocessing(raw.clone())))
        if _is_close(values, raw):
            return f"The loader does not apply {name}.preprocessing. Look at {name}.test_dataloader"
        if twice is not None and _is_close(values, twice):
            return (
                f"The loader applies the preprocessing twice. Look at the Dataset of {name}: it "
                "must return raw samples."
            )
        return (
            f"Look for a transform in the Dataset of {name}, or in its loaders: it belongs into "
            f"{name}.preprocessing, and preprocessing must not depend on setup('fit')."
        )

    def test_two_data_modules_declare_the_same_data(self) -> None:
        found, again = self.still(), self.still_again()
        name = self.data_name()
        try:
            json.dumps(found.identity)
        except (TypeError, ValueError) as error:
            fail(f"{name}.identity() must return plain data, which a checkpoint contains: {error}")
        if found.identity != again.identity:
            fail(
                f"{name}.identity() differs between two data modules with the same settings, so "
                f"no run could be resumed.\n{found.identity}\n{again.identity}\n"
                f"Look for random numbers or the time in {name}.setup or the data function."
            )
        if found.class_counts != again.class_counts:
            fail(
                f"{name}.class_counts() differs between two data modules with the same settings: "
                f"{found.class_counts} and {again.class_counts}. Look at {name}.setup."
            )
        for stage, loader in found.loaders.items():
            length = again.loaders[stage].length
            if loader.length != length:
                fail(
                    f"The {NOUNS[stage]} loader has {loader.length} batches, and that of a second "
                    f"data module with the same settings {length}. Look at {name}.setup."
                )
        train, counts = found.loaders["train"], found.class_counts
        labels = [label for batch in found.passes["train"][0] for label in batch.labels or []]
        # Other tests report samples that are not read, and labels out of range.
        if counts is None or Counter(found.samples("train")) != Counter(train.samples or ()):
            return
        read = [labels.count(label) for label in range(len(counts))]
        if sum(read) == len(labels) and read != counts:
            fail(
                f"{name}.class_counts() is {counts}, but in an epoch the training loader returns "
                f"{read} samples of the classes. Count the labels of the training samples only."
            )


def _batches(found: Reading) -> Iterator[tuple[str, Batch]]:
    for stage in ("train", "val", "test"):
        for batch in found.passes[stage][0] if found.passes[stage] else []:
            yield stage, batch


def _declared_shape(stated: Mapping[str, Any]) -> dict[str, tuple[slice, tuple[int, ...]]]:
    """Return the axes of an input, without the batch dimension, that an attribute declares."""
    declared: dict[str, tuple[slice, tuple[int, ...]]] = {}
    if "image_size" in stated:
        size = stated["image_size"]
        size = (size, size) if isinstance(size, int) else tuple(size)
        declared["image_size"] = slice(-len(size), None), size
    for name in ("in_channels", "in_features", "num_features"):
        if name in stated:
            declared[name] = slice(0, 1), (stated[name],)
    return declared


def _is_close(one: Tensor, other: Tensor) -> bool:
    """Return whether inputs are equal up to rounding, which may depend on the batch size."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if digests_of([one]) == digests_of([other]):
        return True
    return one.is_floating_point() and torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def _described(inputs: Tensor) -> str:
    values = inputs.double()
    return (
        f"{inputs.dtype} {tuple(inputs.shape)}, mean {values.mean():.4g}, standard deviation "
        f"{values.std():.4g}, from {values.min():.4g} to {values.max():.4g}"
    )


def _attempt(compute: Any) -> Tensor | None:
    try:
        result = compute()
    except Exception:
        return None
    return result if isinstance(result, Tensor) else None
