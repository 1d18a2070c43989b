"""Files of each format: their names, and what they need."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bn_lightning import UserError
from bn_lightning.deploy import formats
from bn_lightning.deploy.served import Served, ServedClassifier
from tests.support.exports import outputs_of, said_by, write_checkpoint


def test_without_the_extra(main, tmp_path, monkeypatch):
    ckpt = write_checkpoint(tmp_path / "some.ckpt")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
    code, _, error = main("export", ckpt, "model.onnx")
    assert code == 2 and 'pip install -e ".[onnx]"' in error
    assert main("export", ckpt, "model.pt2", "--source", "sample")[0] == 0


def test_the_format_is_told_by_the_suffix():
    for path in ("model.onnx", "a.b/MODEL.ONNX"):
        assert formats.of(Path(path)) is formats.FORMATS[".onnx"]
    with pytest.raises(
        UserError, match=r"another kind than .onnx \(ONNX\) and .pt2 \(torch.export\)"
    ):
        formats.of(Path("model.tflite"))


class Halved(nn.Module):
    def forward(self, x):
        return x / 2


@pytest.mark.parametrize(
    ("cls", "names"), [(Served, "inputs outputs"), (ServedClassifier, "images logits")]
)
def test_what_a_file_takes_gives_and_says(tmp_path, suffix, cls, names):
    torch.manual_seed(0)
    served = cls(Halved(), nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.ReLU())).eval()
    served.requires_grad_(False)
    form = formats.FORMATS[f".{suffix}"]
    about = {"producer": "somebody", "global_step": 3, "data_sha256": {"a": "b"}}
    content = form.write(served, torch.zeros(7, 2, 3), about)
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(content)
    assert said_by(path) == about
    inputs = torch.randn(20, 2, 3)
    run = form.open(content)
    for batch_size in (1, 2, 20):
        expected = torch.cat([served(batch) for batch in inputs.split(batch_size)])
        torch.testing.assert_close(outputs_of(path, inputs, batch_size), expected)
        torch.testing.assert_close(run(inputs[:batch_size]), expected[:batch_size])
    given, found = names.split()
    if suffix == "onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(
            path, providers=["CPUExecutionProvider"]
        )
        assert session.get_modelmeta().producer_name == "bn_lightning"
        assert [(end.name, end.shape) for end in session.get_inputs()] == [(given, ["N", 2, 3])]
        assert [(end.name, end.shape) for end in session.get_outputs()] == [(found, ["N", 4])]
    else:
        assert torch.export.load(path).graph_signature.user_inputs == (given,)
    assert b"test_formats.py" not in content  # where an operator comes from
