"""Formats of exported files. To add a format, add an entry to `FORMATS`."""

import importlib
import io
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bn_lightning import __version__
from bn_lightning.deploy.served import Forward, Served
from bn_lightning.errors import UserError


@dataclass(frozen=True)
class Format:
    """How to write and read files with one suffix.

    Attributes:
        name: the name in messages.
        write: returns the content of a file, given a network, a few raw samples, and
            metadata as plain data. The file contains the weights and accepts any number
            of samples from 1.
        open: returns the function that the content of a file computes, on the CPU.
        packages: required packages besides torch.
        extra: the extra of this project that installs `packages`.
    """

    name: str
    write: Callable[[Served, Tensor, Mapping[str, Any]], bytes]
    open: Callable[[bytes], Forward]
    packages: tuple[str, ...] = ()
    extra: str = ""

    def refuse_missing_packages(self) -> None:
        """Raise UserError if a package is missing."""
        for package in self.packages:
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise UserError(
                    f"The format {self.name} needs a package that cannot be imported: {error}\n"
                    f'Install the extra: pip install "bn_lightning[{self.extra}]"'
                ) from error


def format_of(path: Path) -> Format:
    """Return the format for the suffix of a path.

    Raises:
        UserError: the suffix is unknown.
    """
    found = FORMATS.get(path.suffix.lower())
    if found is None:
        problem = f"Unsupported format {path.suffix!r}" if path.suffix else f"{path} has no suffix"
        raise UserError(f"{problem}: use {' or '.join(FORMATS)}.")
    return found


def _write_pt2(served: Served, example: Tensor, metadata: Mapping[str, Any]) -> bytes:
    stream = io.BytesIO()
    files = {"metadata.json": json.dumps(metadata)}
    torch.export.save(_program(served, example), stream, extra_files=files)
    return stream.getvalue()


def _open_pt2(content: bytes) -> Forward:
    return torch.export.load(io.BytesIO(content)).module()


def _write_onnx(served: Served, example: Tensor, metadata: Mapping[str, Any]) -> bytes:
    # The exporter warns about torchvision operators, which are not used here.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    exported = torch.onnx.export(
        _program(served, example),
        dynamo=True,
        verbose=False,
        input_names=[served.input_name],
        output_names=[served.output_name],
    )
    assert exported is not None
    model = exported.model_proto
    # Older runtimes refuse a file of a newer IR version, even if its operators are old.
    onnx = importlib.import_module("onnx")
    model.ir_version = onnx.helper.find_min_ir_version_for(model.opset_import)
    model.producer_name, model.producer_version = "bn_lightning", __version__
    for name, value in metadata.items():
        text = value if isinstance(value, str) else json.dumps(value)
        model.metadata_props.add(key=name, value=text)
    # The origin of each operator in torch would take 5% of the file.
    for node in model.graph.node:
        node.ClearField("metadata_props")
    model.graph.ClearField("value_info")
    for tensor in (*model.graph.input, *model.graph.output):
        tensor.type.tensor_type.shape.dim[0].dim_param = "N"
    return bytes(model.SerializeToString())


def _open_onnx(content: bytes) -> Forward:
    """Return the function that the file computes. It uses as many threads as torch."""
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Otherwise the threads of ONNX Runtime keep the cores busy after a call.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    (graph_input,), (graph_output,) = session.get_inputs(), session.get_outputs()

    def forward(inputs: Tensor) -> Tensor:
        feed = {graph_input.name: inputs.numpy()}
        (outputs,) = session.run([graph_output.name], feed)
        return torch.from_numpy(outputs)

    return forward


def _program(served: Served, example: Tensor) -> torch.export.ExportedProgram:
    """Export the network with torch.export, for any number of samples from 1."""
    samples = torch.export.Dim("N", min=1)
    program = torch.export.export(served, (example,), dynamic_shapes=({0: samples},))
    for node in program.graph.nodes:
        # The stack trace contains paths of this machine.
        node.meta.pop("stack_trace", None)
    return program


FORMATS = {
    ".onnx": Format(
        "ONNX", _write_onnx, _open_onnx, ("onnx", "onnxscript", "onnxruntime"), extra="onnx"
    ),
    ".pt2": Format("torch.export", _write_pt2, _open_pt2),
}
