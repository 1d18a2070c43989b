"""Helpers for tests of `export`: checkpoints, and the expected content of exported files."""

import json
from collections import Counter
from importlib.metadata import version

import pytest
import torch

from bn_lightning import cli
from bn_lightning.data import sources
from bn_lightning.data.fashion_mnist import MEAN, STD
from bn_lightning.deploy import export
from bn_lightning.networks.lenet import LeNet
from bn_lightning.training import checkpoints
from tests.projects.friedman.experiment import Regression, Table

FRIEDMAN = "tests.projects.friedman.experiment:EXPERIMENT"

SOURCE = "system" if sources.SYSTEM.is_dir() else "sample"
# Metadata that are text. All others are JSON.
TEXTS = ("classes", "producer", "torch", "checkpoint", "network", "norm", "data_source", "commit")

FOLDED = [
    f"norm{i} is folded into {layer}" for i, layer in enumerate(("conv1", "conv2", "fc1", "fc2"), 1)
]
# Operators of the exported LeNet by format, after folding: preprocessing, layers, reshaping.
OPERATORS = {
    "onnx": Counter({"Unsqueeze": 1, "Cast": 1, "Div": 1, "Conv": 2, "Reshape": 1, "Gemm": 3}),
    "pt2": Counter({"unsqueeze": 1, "div": 1, "conv2d": 2, "flatten": 1, "linear": 3}),
}
# Additional operators with `--data.normalize true`.
STANDARDIZED = {
    "onnx": Counter({"Sub": 1, "Div": 1}),
    "pt2": Counter({"sub": 1, "div": 1}),
}
PHI_AND_POOL = {
    ("onnx", "sigmoid", "avg"): Counter({"Sigmoid": 4, "AveragePool": 2}),
    ("onnx", "relu", "max"): Counter({"Relu": 4, "MaxPool": 2}),
    ("pt2", "sigmoid", "avg"): Counter({"sigmoid": 4, "avg_pool2d": 2}),
    ("pt2", "relu", "max"): Counter({"relu": 4, "max_pool2d": 2}),
}


def write_checkpoint(path, normalize=False, dtype=torch.float32, **settings):
    """Write a checkpoint of LeNet with random values in its norm layers.

    Its optimizer cannot be imported.
    """
    torch.manual_seed(0)
    network = LeNet(**settings)
    for name, values in (*network.named_parameters(), *network.named_buffers()):
        if "norm" in name and values.is_floating_point():
            is_spread = any(word in name for word in ("var", "std", "weight", "gamma"))
            values.data.uniform_(0.5, 2.0) if is_spread else values.data.normal_()
    weights = network.state_dict().items()
    content = {
        "state_dict": {f"network.{name}": values.to(dtype) for name, values in weights},
        "hyper_parameters": settings | {"optimizer": "no_such_package.Optimizer"},
        "datamodule_hyper_parameters": {"normalize": normalize, "seed": 3},
        "epoch": 1,
        "global_step": 44,
    }
    torch.save(content, path)
    return path


def write_regression(path, optimizer="no_such_package.Optimizer", **settings):
    """Write a checkpoint of an experiment without classes and images."""
    torch.manual_seed(0)
    task, data = Regression(**settings), Table(rows=100, seed=3)
    task.network[1].running_var.uniform_(0.5, 2.0)
    content = {
        "state_dict": task.state_dict(),
        "hyper_parameters": dict(task.hparams) | {"optimizer": optimizer},
        "datamodule_hyper_parameters": dict(data.hparams) | {"folder": "of another machine"},
        "data": {"source": "formula"},
        "epoch": 3,
        "global_step": 12,
        "pytorch-lightning_version": version("lightning"),
    }
    torch.save(content, path)
    return path


def write_export(ckpt, out, norm=None, source="sample"):
    """Export a checkpoint of this project's experiment."""
    trusted = {} if norm is None else {"model.norm": norm}
    return export.export(str(ckpt), out, cli.EXPERIMENT, trusted, {"source": source})


def load_exported(path):
    """Return the function that an exported file computes, without using code of this project."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (graph_input,), (graph_output,) = session.get_inputs(), session.get_outputs()

    def forward(batch):
        (outputs,) = session.run([graph_output.name], {graph_input.name: batch.numpy()})
        return torch.from_numpy(outputs)

    return forward


def outputs_of(path, inputs, batch_size):
    """Return the outputs of an exported file, computed in batches."""
    forward = load_exported(path)
    return torch.cat([forward(batch) for batch in inputs.split(batch_size)])


@torch.no_grad()
def assert_matches_checkpoint(path, ckpt, source=SOURCE):
    """Compare the logits of an exported file with those of the checkpoint's LeNet."""
    _, content = checkpoints.load(str(ckpt))
    saved = content["hyper_parameters"]
    settings = ("norm", "norm_args", "activation", "pooling")
    network = LeNet(**{name: saved[name] for name in settings if name in saved})
    weights = content["state_dict"].items()
    network.load_state_dict({k.removeprefix("network."): v for k, v in weights})
    images = sources.load(source).test_images
    x = images.unsqueeze(1) / 255
    x = (x - MEAN) / STD if content["datamodule_hyper_parameters"]["normalize"] else x
    expected = network.eval()(x)
    allowed = 1e-5 * max(1, expected.abs().max())
    best, second = expected.topk(2).values.T
    for batch_size, first in ((256, len(images)), (7, 70), (1, 10)):
        logits = outputs_of(path, images[:first], batch_size)
        assert logits.shape == (first, 10) and logits.dtype == torch.float32
        assert (logits - expected[:first]).abs().max() <= allowed
        is_clear = (best - second)[:first] >= allowed
        assert torch.equal(logits.argmax(1)[is_clear], expected[:first].argmax(1)[is_clear])


def operators(path):
    """Count the operators of an exported file by name, without the suffix of in-place variants."""
    if path.suffix == ".onnx":
        nodes = pytest.importorskip("onnx").load(path).graph.node
        return Counter(node.op_type for node in nodes)
    graph = torch.export.load(path).graph
    names = [n.target.overloadpacket.__name__ for n in graph.nodes if n.op == "call_function"]
    return Counter(name.rstrip("_") for name in names)


def metadata_of(path):
    """Return the metadata of an exported file."""
    if path.suffix == ".onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found = session.get_modelmeta().custom_metadata_map
        return {n: value if n in TEXTS else json.loads(value) for n, value in found.items()}
    files = {"metadata.json": ""}
    torch.export.load(path, extra_files=files)
    return json.loads(files["metadata.json"])
