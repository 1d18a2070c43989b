"""The test that training, `export` and `predict` have the same preprocessing."""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from bn_lightning.deploy.served import Served
from bn_lightning.errors import UserError
from bn_lightning.testing.data.base import NOUNS, LoaderTests, likely_cause
from bn_lightning.testing.data.contents import identified, recorded
from bn_lightning.testing.data.reading import NUM_KEPT
from bn_lightning.testing.data.source import quiet
from bn_lightning.testing.failures import describe, fail
from bn_lightning.training.data_module import DataModule

CHUNK = 256


class PreprocessingTests(LoaderTests):
    """Loaders return what `export` and `predict` give to the network."""

    def test_preprocessing_is_the_same_in_the_loaders_export_and_predict(self) -> None:
        found, name = self.still(), self.data_name()
        # `export` and `predict` construct the data module from a checkpoint.
        data = self.source().build()
        with quiet():
            raw, targets = self._test_samples(data)
            served = Served(data.preprocessing, nn.Identity()).eval()
            # Preprocessing may work in place.
            parts = [served(part.clone()) for part in torch.split(raw, CHUNK)]
        labels = torch.split(targets, CHUNK)
        expected = [s for batch in zip(parts, labels, strict=True) for s in recorded(batch).samples]
        for stage, kept in (("test", found.tested), ("predict", found.predicted)):
            read = found.samples(stage)
            # Other tests report another order, and another number of samples.
            if len(read) != len(expected) or Counter(read) == Counter(expected):
                continue
            loaded = torch.cat(kept)[:NUM_KEPT]
            exported = torch.cat(parts)[: len(loaded)]
            if _is_close(loaded, exported):
                continue
            if Counter(identified(read, "inputs")) == Counter(identified(expected, "inputs")):
                fail(
                    f"The {NOUNS[stage]} loader returns other targets than test_samples() for the "
                    "same inputs.",
                    f"{name}.{stage}_dataloader and {name}.test_samples.",
                )
            fail(
                "`export` and `predict` give preprocessing(test_samples()) to the network, but the "
                f"{NOUNS[stage]} loader returns other inputs.\n"
                f"Loader: {_described(loaded)}\nExport: {_described(exported)}\nThe largest "
                f"difference is {_distance(loaded, exported)}.{likely_cause(found, stage)}",
                self._cause_of_difference(data, raw[: len(loaded)], loaded),
            )

    def _test_samples(self, data: DataModule) -> tuple[Tensor, Tensor]:
        try:
            data.prepare_data()
            data.setup("test")
            return data.test_samples()
        except UserError as error:
            pytest.skip(str(error).splitlines()[0])
        except Exception as error:
            name = self.data_name()
            fail(
                f"{name} cannot be used without a trainer, as by `export`: {describe(error)}",
                f"{name}.setup('test') and {name}.test_samples().",
            )

    def _cause_of_difference(self, data: DataModule, raw: Tensor, loaded: Tensor) -> str:
        name = self.data_name()
        if _is_close(loaded, raw):
            return f"{name}.test_dataloader, which does not apply {name}.preprocessing."
        try:
            twice = data.preprocessing(data.preprocessing(raw.clone()))
        except Exception:
            twice = None
        if twice is not None and _is_close(loaded, twice):
            return (
                f"the Dataset of {name}. The loader applies the preprocessing twice; the Dataset "
                "must return raw samples."
            )
        return (
            f"transforms in the Dataset and the loaders of {name}, which belong in "
            f"{name}.preprocessing. Preprocessing must not need training data."
        )


def _is_close(one: Tensor, other: Tensor) -> bool:
    """Return whether inputs are equal up to rounding, which may depend on the batch size."""
    is_same_kind = one.shape == other.shape and one.dtype == other.dtype
    return is_same_kind and torch.allclose(
        one.double(), other.double(), rtol=1e-5, atol=1e-6, equal_nan=True
    )


def _distance(one: Tensor, other: Tensor) -> str:
    if one.shape != other.shape:
        return "in the shape"
    return f"{(one.double() - other.double()).abs().max():.2g}"


def _described(inputs: Tensor) -> str:
    values = inputs.double()
    return (
        f"{inputs.dtype} {tuple(inputs.shape)}, mean {values.mean():.4g}, standard deviation "
        f"{values.std():.4g}, from {values.min():.4g} to {values.max():.4g}"
    )
