"""File formats: suffixes, required packages, inputs, outputs and metadata."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bn_lightning import UserError
from bn_lightning.deploy import formats
from bn_lightning.deploy.served import Served, ServedClassifier
from tests.support.exports import metadata_of, outputs_of, write_checkpoint


def test_onnx_requires_the_extra_and_pt2_does_not(main, tmp_path, monkeypatch):
    ckpt = write_checkpoint(tmp_path / "some.ckpt")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
    code, _, error = main("export", ckpt, "model.onnx")
    assert code == 2 and 'pip install "bn_lightning[onnx]"' in error
    assert main("export", ckpt, "model.pt2", "--source", "sample")[0] == 0


def test_the_suffix_determines_the_format():
    for path in ("model.onnx", "a.b/MODEL.ONNX"):
        assert formats.format_of(Path(path)) is formats.FORMATS[".onnx"]
    with pytest.raises(UserError, match=r"Unsupported format '\.tflite': use \.onnx or \.pt2\."):
        formats.format_of(Path("model.tflite"))


class Halved(nn.Module):
    def forward(self, x):
        return x / 2


@pytest.mark.parametrize(
    ("cls", "names"), [(Served, "inputs outputs"), (ServedClassifier, "images logits")]
)
def test_a_file_has_the_declared_inputs_outputs_and_metadata(tmp_path, suffix, cls, names):
    torch.manual_seed(0)
    served = cls(Halved(), nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.ReLU())).eval()
    served.requires_grad_(False)
    form = formats.FORMATS[f".{suffix}"]
    metadata = {"producer": "somebody", "global_step": 3, "data_sha256": {"a": "b"}}
    content = form.write(served, torch.zeros(7, 2, 3), metadata)
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(content)
    assert metadata_of(path) == metadata
    inputs = torch.randn(20, 2, 3)
    forward = form.open(content)
    for batch_size in (1, 2, 20):
        expected = torch.cat([served(batch) for batch in inputs.split(batch_size)])
        torch.testing.assert_close(outputs_of(path, inputs, batch_size), expected)
        torch.testing.assert_close(forward(inputs[:batch_size]), expected[:batch_size])
    input_name, output_name = names.split()
    if suffix == "onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(
            path, providers=["CPUExecutionProvider"]
        )
        assert session.get_modelmeta().producer_name == "bn_lightning"
        [graph_input], [graph_output] = session.get_inputs(), session.get_outputs()
        assert (graph_input.name, graph_input.shape) == (input_name, ["N", 2, 3])
        assert (graph_output.name, graph_output.shape) == (output_name, ["N", 4])
        # ONNX's table of versions: opsets up to 18, 20 and 22 need at least IR 8, 9 and 10.
        model = pytest.importorskip("onnx").load(path)
        [opset] = [entry.version for entry in model.opset_import if not entry.domain]
        assert model.ir_version <= {18: 8, 19: 9, 20: 9}.get(opset, 10)
    else:
        assert torch.export.load(path).graph_signature.user_inputs == (input_name,)
    # torch records the source file of each operator.
    assert b"test_formats.py" not in content
