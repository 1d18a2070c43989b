"""The test of exported files."""

import pytest
import torch
from torch import Tensor

from bn_lightning.deploy import folding, formats, served
from bn_lightning.deploy.verification import Verification
from bn_lightning.errors import RunFailed, UserError
from bn_lightning.testing.failures import describe, fail
from bn_lightning.testing.tasks.base import FittedTests
from bn_lightning.testing.tasks.fitted import Fitted

# Raw samples for the comparison of exported files.
EXPORTED_SAMPLES = 40


class ExportTests(FittedTests):
    """Exported files have the outputs of the network."""

    @pytest.mark.parametrize("suffix", list(formats.FORMATS))
    def test_an_exported_file_agrees_with_the_network(self, fitted: Fitted, suffix: str) -> None:
        form = formats.FORMATS[suffix]
        try:
            form.refuse_missing_packages()
            inputs = fitted.data.test_samples()[0][:EXPORTED_SAMPLES]
        except UserError as error:
            pytest.skip(str(error))
        where = (
            "branches on values or on the batch size, reshapes with a fixed batch size, Python "
            "numbers that change, and attributes that forward() sets."
        )
        with torch.no_grad():
            try:
                _verify_export(fitted, form, inputs)
            except RunFailed as error:
                fail(str(error).removesuffix(" No file was written."), where)
            except Exception as error:
                fail(f"torch cannot export the network as {suffix}: {describe(error)}", where)


def _verify_export(fitted: Fitted, form: formats.Format, inputs: Tensor) -> None:
    """Export the network as `export` does, and compare outputs for several batch sizes."""
    restored = fitted.restore()
    data_class = served.Served if fitted.data.classes is None else served.ServedClassifier
    eager = data_class(fitted.data.preprocessing, restored.task.network).eval()
    verification = Verification(eager, inputs)
    network, _ = folding.fold(eager.network, eager.preprocessing(inputs.clone()))
    exported = data_class(fitted.data.preprocessing, network).eval()
    verification.verify("The network with folded norms", exported)
    content = form.write(exported, torch.zeros_like(inputs[:7]), {})
    verification.verify(f"The exported {form.name} file", form.open(content))
