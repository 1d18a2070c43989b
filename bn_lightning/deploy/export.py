"""A checkpoint as one file that runs without this project, its norms folded away: the command `export`."""

import copy
import importlib
import inspect
import io
import json
import logging
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from jsonargparse import ArgumentParser
from torch import Tensor, fx, nn

from bn_lightning import __version__
from bn_lightning.data import sources
from bn_lightning.data.fashion_mnist import CLASSES, MEAN, STD
from bn_lightning.errors import RunFailed, UserError
from bn_lightning.networks.lenet import LeNet
from bn_lightning.runs import records
from bn_lightning.terminal import print_table
from bn_lightning.training import checkpoints

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # their weights are (C, ...), C the channels of their output
NO_NORMS = {f"torch.nn.modules.{kind}" for kind in ("activation", "pooling", "dropout", "flatten")}
TOLERANCE = 1e-5  # of the largest value, where that is above 1

Run = Callable[[Tensor], Tensor]  # from images to logits, as `Served` has them


class Served(nn.Module):
    """A network with what the data module does to its images: uint8 (N, 28, 28), 0 to 255, to logits (N, 10)."""

    def __init__(self, network: nn.Module, normalize: bool) -> None:
        super().__init__()
        self.network = network
        self.normalize = normalize

    def forward(self, images: Tensor) -> Tensor:
        x = images.unsqueeze(1).div(255)
        return self.network((x - MEAN) / STD if self.normalize else x)  # type: ignore[no-any-return]


class _Tracer(fx.Tracer):
    """Looks into what holds layers; a norm is one thing, whatever it is made of."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, LAYERS) or not any(isinstance(part, LAYERS) for part in m.modules())


@torch.no_grad()
def fold(network: nn.Module, x: Tensor) -> tuple[nn.Module, list[str]]:
    """Fold each module that is an affine map per channel into the layer right before it.

    That is told by what the module does to x and to random input, never by its class.

    Args:
        network: in eval mode; it stays as it is.
        x: a batch of its input.

    Returns:
        The folded network, and a line about each module that was folded, or is no layer, activation, pooling, dropout
        or flatten of torch and was not. A network that torch.fx cannot trace is given back, and the line says so.
    """
    try:
        graph = _Tracer().trace(network)
    except Exception as error:  # tracing runs the network's own code, which may raise anything
        return network, [f"nothing is folded, since torch.fx cannot trace the network: {_reason(error)}"]
    folded = fx.GraphModule(copy.deepcopy(network), graph)
    traced = fx.Interpreter(folded, garbage_collect_values=False)
    traced.run(x)
    called = [node for node in graph.nodes if node.op == "call_module"]
    uses = Counter(node.target for node in called)
    given = {node: traced.env[node.all_input_nodes[0]] for node in called}  # as it was before anything was folded
    notes = []
    for node in called:
        name, module, before = str(node.target), folded.get_submodule(str(node.target)), node.all_input_nodes[0]
        layer = folded.get_submodule(str(before.target)) if before.op == "call_module" else None
        alone = len(before.users) == uses[before.target] == 1
        if isinstance(layer, LAYERS) and alone and given[node].dim() == layer.weight.dim():
            form = _affine(module, given[node])
            if form is not None:
                _put_into(layer, *form)
                node.replace_all_uses_with(before)
                graph.erase_node(node)
                notes.append(f"{name} is folded into {before.target}")
                continue
        if not isinstance(module, LAYERS) and type(module).__module__ not in NO_NORMS:
            notes.append(f"{name}, a {type(module).__name__}, has no affine form in evaluation: exported as it is")
    folded.delete_all_unused_submodules()
    folded.recompile()
    return folded, notes


def _put_into(layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d, a: Tensor, b: Tensor) -> None:
    """Make the layer give a * y + b, where it gave y."""
    weight = layer.weight.double() * a.view(-1, *[1] * (layer.weight.dim() - 1))
    bias = b if layer.bias is None else layer.bias.double() * a + b
    layer.weight, layer.bias = (nn.Parameter(t.to(layer.weight.dtype), False) for t in (weight, bias))


def _affine(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """a and b of module(x) = a * x + b, float64 (C,), where that holds on x (N, C, ...) and on random input."""

    def per_channel(t: Tensor) -> Tensor:
        return t.transpose(0, 1).flatten(1).double()  # (C, values)

    module, x = copy.deepcopy(module).double(), x.double()
    # At the size that x has and above: a norm may compute in float32 by itself, which at 0 could seem another map.
    size = float(x.abs().max().clamp(min=1))
    random = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    try:
        b = per_channel(module(torch.zeros_like(x)))[:, :1]
        a = (per_channel(module(torch.full_like(x, size)))[:, :1] - b) / size
        for probe in (x, *(random * size * scale for scale in (1, 30, 1000))):
            y, values = module(probe), per_channel(probe)
            allowed = TOLERANCE * (a.abs() * values.abs().amax(1, keepdim=True) + b.abs())
            if y.shape != x.shape or not bool(((per_channel(y) - (a * values + b)).abs() <= allowed).all()):
                return None  # NaN is not below anything
    except Exception:  # a module that cannot be asked, for whatever reason, is none that can be folded
        return None
    return a.flatten(), b.flatten()


@dataclass
class Exported:
    """What `export` found: `eager` is the checkpoint's network, `file` what the file computes, `notes` are those of
    `fold`, `difference` is the largest between logits of the two, `changed` the number of images with another class."""

    eager: Served
    file: Run
    ckpt: Path
    notes: list[str]
    parameters: int
    images: sources.Images
    difference: float
    changed: int
    test_acc: float


@torch.no_grad()  # by which the article's norm tells that it is not in training
def export(
    ckpt_path: str, out: str | Path, norm: str | None = None, source: str = "auto", root: str | Path = "data"
) -> Exported:
    """Write the network of a checkpoint into one file, once the file has proven to do what the network does.

    Its input is `images`, uint8 (N, 28, 28), 0 to 255; its output is `logits`, float32 (N, 10), for any N from 1.

    Args:
        ckpt_path: a file or an address.
        out: ends in .onnx, or in .pt2 for `torch.export.load`. An older file is replaced at the end, or stays whole.
        norm: the checkpoint's norm, where that is an import path: a file's word is not enough to run code.
        source, root: of the test images, as `sources.load` has them.

    Raises:
        UserError: another suffix, a package that is missing, or a checkpoint that cannot be exported.
        RunFailed: the file cannot be written, or does not do what the network does.
    """
    out = Path(out)
    _refuse_what_cannot_be_written(out)
    local, checkpoint = checkpoints.load(ckpt_path)
    of_data = checkpoint.get("datamodule_hyper_parameters", {})
    eager = Served(_network(ckpt_path, checkpoint, norm), of_data.get("normalize", False)).eval()
    images = sources.load(source, root)
    expected = _logits(eager, images.test_images)
    if not expected.isfinite().all():
        raise RunFailed(f"{ckpt_path!r} gives logits that are no numbers: its training has diverged.")
    network, notes = fold(eager.network, Served(nn.Identity(), eager.normalize)(images.test_images[:64]))
    served = Served(network, eager.normalize).eval()
    _compare("The folded network", _logits(served, images.test_images), expected)
    test_acc = float((expected.argmax(1) == images.test_labels).double().mean())
    about = _about(ckpt_path, local, checkpoint) | {"test_acc": test_acc, "test_images": len(images.test_labels)}
    content = _content(out.suffix.lower(), served, about)
    file = _open(content, out.suffix.lower())
    difference, changed = _compare(f"The file for {out}", _logits(file, images.test_images), expected)
    try:
        checkpoints.write_whole(out, content)
    except OSError as error:
        raise RunFailed(f"{out} cannot be written: {error.strerror or error}. An older one is as it was.") from error
    parameters = sum(p.numel() for p in network.parameters())
    return Exported(eager, file, Path(local), notes, parameters, images, difference, changed, test_acc)


def _refuse_what_cannot_be_written(out: Path) -> None:
    if out.suffix.lower() not in (".onnx", ".pt2"):
        raise UserError(f"{str(out)!r} is to be a file of another kind than .onnx (ONNX) and .pt2 (torch.export).")
    if not out.parent.is_dir():
        raise UserError(f"There is no folder {str(out.parent)!r} to write {out.name} into.")
    if out.suffix.lower() == ".onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            _of_extra(package)


def _of_extra(package: str) -> Any:
    """A package of the extra `onnx`, imported where it is needed: a .pt2 does without."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f'A file .onnx needs what is not all here ({error}): pip install -e ".[onnx]"') from error


def _network(ckpt_path: str, checkpoint: dict[str, Any], norm: str | None) -> nn.Module:
    """The checkpoint's network in float32. Its optimizer and scheduler, which may be import paths, are left alone."""
    settings = checkpoint.get("hyper_parameters", {})
    used = settings.get("norm", "custom")
    if norm is None and "." in used:
        raise checkpoints.not_trusted(ckpt_path, "norm", used, "--norm")
    if norm not in (None, used):
        raise UserError(f"--norm is {norm!r}, and {ckpt_path!r} was trained with {used!r}: leave it out, or name that.")
    try:
        network = LeNet(**{name: settings[name] for name in inspect.signature(LeNet).parameters if name in settings})
        weights = checkpoint["state_dict"].items()
        network.load_state_dict({k.removeprefix("network."): v for k, v in weights if k.startswith("network.")})
    except (KeyError, RuntimeError) as error:  # of a setting, or of the weights
        raise UserError(f"{ckpt_path!r} does not fit this project's LeNet: {error}") from error
    return network.requires_grad_(False)


def _logits(run: Run, images: Tensor) -> Tensor:
    """The logits of all images, taken in batches of 1, 7, and then of 256."""
    try:
        return torch.cat([run(batch) for batch in images.tensor_split([1, *range(8, len(images), 256)])])
    except Exception as error:  # of a norm's code, or of the runtime
        raise RunFailed(f"The network cannot be run on batches of 1, 7 and 256 images: {_reason(error)}") from error


def _compare(what: str, logits: Tensor, expected: Tensor) -> tuple[float, int]:
    """The largest difference, and the number of images with another class.

    Raises:
        RunFailed: a difference above `TOLERANCE`, or another class where the two best are further apart than that.
    """
    allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
    difference = float((logits - expected).abs().max())
    best, second = expected.topk(2).values.T
    changed = logits.argmax(1) != expected.argmax(1)
    if not difference <= allowed or bool((changed & (best - second >= allowed)).any()):
        raise RunFailed(
            f"{what} differs from the checkpoint's network: logits by up to {difference:.2g}, where {allowed:.2g} is "
            f"allowed, and {int(changed.sum()):,} of {len(changed):,} classes. Nothing is written."
        )
    return difference, int(changed.sum())


def _about(ckpt_path: str, local: str, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What the file says of itself; what is not known is left out."""
    step, data = checkpoint.get("global_step"), checkpoint.get("FashionMNIST", {})
    validations = records.kept_in(checkpoint).get("validations", [])
    path = Path(urlsplit(ckpt_path).path if "://" in ckpt_path else ckpt_path)
    # NAME/N/checkpoints/FILE, and nobody's home or password.
    kept = (
        [part for part in path.parts if part != path.anchor][-4:] if path.parent.name == "checkpoints" else [path.name]
    )
    about = {
        "classes": "\n".join(CLASSES),  # read without a parser of JSON
        "producer": f"bn_lightning {__version__}",
        "torch": str(torch.__version__),
        "checkpoint": "/".join(kept),
        "global_step": step,
        "norm": checkpoint.get("hyper_parameters", {}).get("norm"),
        "seed": checkpoint.get("datamodule_hyper_parameters", {}).get("seed"),
        "data_source": data.get("source"),
        "data_sha256": data.get("sha256"),
        "val_acc": next((v["val_acc"] for v in validations if v["step"] == step), None),
        "commit": records.read_result(Path(local).absolute().parent.parent).get("commit"),
    }
    return {name: value for name, value in about.items() if value is not None}


def _content(suffix: str, served: Served, about: dict[str, Any]) -> bytes:
    """The bytes of the file, its weights among them."""
    example = torch.zeros(7, 28, 28, dtype=torch.uint8)  # of a slice, a .pt2 would hold all that it was cut from
    try:
        program = torch.export.export(served, (example,), dynamic_shapes={"images": {0: torch.export.Dim("N", min=1)}})
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # paths of the machine that exports
        if suffix == ".pt2":
            stream = io.BytesIO()
            torch.export.save(program, stream, extra_files={"metadata.json": json.dumps(about)})
            return stream.getvalue()
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # of torchvision, which this network has no use for
        exported = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=["images"], output_names=["logits"]
        )
    except Exception as error:  # torch has no exception of its own for code that it cannot export
        raise RunFailed(f"torch cannot export the network: {_reason(error)}") from error
    assert exported is not None
    model = exported.model_proto
    model.producer_name, model.producer_version = "bn_lightning", __version__
    for name, value in about.items():
        model.metadata_props.add(key=name, value=value if isinstance(value, str) else json.dumps(value))
    for node in model.graph.node:
        node.ClearField("metadata_props")  # 5% of the file, about how torch came to each operator
    model.graph.ClearField("value_info")
    for end in (*model.graph.input, *model.graph.output):
        end.type.tensor_type.shape.dim[0].dim_param = "N"
    return bytes(model.SerializeToString())


def _open(content: bytes, suffix: str) -> Run:
    """What an exported file computes, on the CPU, on as many threads as torch has."""
    if suffix == ".pt2":
        return torch.export.load(io.BytesIO(content)).module()
    onnxruntime = _of_extra("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Else its threads spin on after a call, on the cores of what is run next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


@torch.inference_mode()
def milliseconds(sides: dict[str, Run], images: Tensor, seconds: float, calls: int) -> dict[str, list[float]]:
    """Milliseconds of one call, a number for each round that fits into `seconds`, of one or more.

    The sides take turns: in every round each has a call to warm up and then some `calls`.
    """
    times: dict[str, list[float]] = {side: [] for side in sides}
    end = time.perf_counter() + seconds
    while not all(times.values()) or time.perf_counter() < end:
        for side, run in sides.items():
            time.sleep(0.01)  # torch's threads spin on for a while
            run(images)
            start = time.perf_counter()
            for _ in range(calls):
                run(images)
            times[side].append((time.perf_counter() - start) * 1e3 / calls)
    return times


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def main() -> None:
    """`export CKPT OUT`: write the file, and print what was folded, what was proven, and how fast it is."""
    parser = ArgumentParser(
        prog="python -m bn_lightning export", description="Make a file of a checkpoint that any runtime takes."
    )
    parser.add_argument("ckpt", type=str, help="The checkpoint: runs/NAME/N/checkpoints/best.ckpt")
    parser.add_argument("out", type=str, help="The file to write: model.onnx, or model.pt2 for torch.export.load")
    parser.add_argument("--norm", type=str | None, default=None, help="The checkpoint's norm, if it is an import path.")
    parser.add_argument("--source", type=str, default="auto", help="Of the test images, as --data.source of fit.")
    parser.add_argument("--root", type=str, default="data", help="The folder that keeps downloads.")
    args = parser.parse_args(sys.argv[2:])
    out = Path(args.out)
    done = export(args.ckpt, out, args.norm, args.source, args.root)
    before = sum(p.numel() for p in done.eager.parameters())
    print("\n".join(done.notes))
    print(
        f"{done.parameters:,} parameters, of {before:,}\n"
        f"{len(done.images.test_labels):,} test images ({done.images.source}): logits differ by at most "
        f"{done.difference:.1e}, the class of {done.changed} images; test acc {done.test_acc:.4f}\n"
        f"{out}: {out.stat().st_size:,} bytes, of a checkpoint of {done.ckpt.stat().st_size:,}"
    )
    sides: dict[str, Run] = {"eager": done.eager, out.name: done.file}
    rows = []
    for size, calls in ((1, 20), (256, 4)):
        times = milliseconds(sides, done.images.test_images[:size], 0.5, calls)
        rows.append([f"{size}", *(f"{statistics.median(values):.3f}" for values in times.values())])
    print(f"\nmilliseconds, median, on {torch.get_num_threads()} threads")
    print_table(("images at once", *sides), rows)
