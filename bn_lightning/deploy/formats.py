"""The formats of exported files. A new format is one entry of `FORMATS`."""

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
from bn_lightning.deploy.served import Run, Served
from bn_lightning.errors import UserError


@dataclass(frozen=True)
class Format:
    """How files with one suffix are written and read.

    Attributes:
        name: for messages.
        write: makes the content of a file, weights included, from a network, a few raw samples, and
            metadata as plain data. The file must take any number of samples from 1.
        open: returns what a file's content computes, on the CPU.
        packages: those that are needed beside torch; the extra `extra` installs them.
    """

    name: str
    write: Callable[[Served, Tensor, Mapping[str, Any]], bytes]
    open: Callable[[bytes], Run]
    packages: tuple[str, ...] = ()
    extra: str = ""

    def refuse_missing_packages(self) -> None:
        """Raise UserError if a package is missing."""
        for package in self.packages:
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise UserError(
                    f"{self.name} needs packages that are not all installed ({error}): "
                    f'pip install -e ".[{self.extra}]"'
                ) from error


def of(path: Path) -> Format:
    """Return the format of a file by its suffix.

    Raises:
        UserError: an unknown suffix.
    """
    found = FORMATS.get(path.suffix.lower())
    if found is None:
        known = " and ".join(f"{suffix} ({form.name})" for suffix, form in FORMATS.items())
        raise UserError(f"{str(path)!r} is to be a file of another kind than {known}.")
    return found


def _write_pt2(served: Served, example: Tensor, about: Mapping[str, Any]) -> bytes:
    stream = io.BytesIO()
    files = {"metadata.json": json.dumps(about)}
    torch.export.save(_program(served, example), stream, extra_files=files)
    return stream.getvalue()


def _open_pt2(content: bytes) -> Run:
    return torch.export.load(io.BytesIO(content)).module()


def _write_onnx(served: Served, example: Tensor, about: Mapping[str, Any]) -> bytes:
    # Its warnings are about torchvision's operators.
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
    model.producer_name, model.producer_version = "bn_lightning", __version__
    for name, value in about.items():
        text = value if isinstance(value, str) else json.dumps(value)
        model.metadata_props.add(key=name, value=text)
    for node in model.graph.node:
        # 5% of the file, about where torch has each operator from.
        node.ClearField("metadata_props")
    model.graph.ClearField("value_info")
    for end in (*model.graph.input, *model.graph.output):
        end.type.tensor_type.shape.dim[0].dim_param = "N"
    return bytes(model.SerializeToString())


def _open_onnx(content: bytes) -> Run:
    """Return what the file computes, on as many threads as torch has."""
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Otherwise its threads keep spinning after a call, on cores that the next program needs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    (given,), (found,) = session.get_inputs(), session.get_outputs()

    def run(inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run([found.name], {given.name: inputs.numpy()})[0])

    return run


def _program(served: Served, example: Tensor) -> torch.export.ExportedProgram:
    """Return the network as a program of torch.export, for any number of samples from 1."""
    samples = torch.export.Dim("N", min=1)
    program = torch.export.export(served, (example,), dynamic_shapes=({0: samples},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of the machine that exports
    return program


FORMATS = {
    ".onnx": Format(
        "ONNX", _write_onnx, _open_onnx, ("onnx", "onnxscript", "onnxruntime"), extra="onnx"
    ),
    ".pt2": Format("torch.export", _write_pt2, _open_pt2),
}
