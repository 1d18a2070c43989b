"""The command `inspect`: show the network, settings, data and metrics of a checkpoint.

Code in the file is not executed, and no network is built.
"""

import json
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from bn_lightning import terminal
from bn_lightning.deploy import content
from bn_lightning.errors import UserError
from bn_lightning.norms import recognition
from bn_lightning.runs import experiment as experiments
from bn_lightning.runs import records, result
from bn_lightning.runs.experiment import Experiment
from bn_lightning.runs.settings import settings_in
from bn_lightning.training.data_module import DataModule
from bn_lightning.training.task import Task

MAX_CHANNELS = 6  # of a norm, printed one by one
MAX_VALUES = 5_000_000  # of all norms
# Limits of the tables. --json has no such limits.
MAX_ROWS = 5_000
MAX_CHARACTERS = 2_000
MAX_NAME = 200  # characters of cells that are not wrapped


def describe(path: str, experiment: Experiment) -> dict[str, Any]:
    """Return a description of the checkpoint at `path`, as plain data.

    Keys:
        checkpoint, bytes, written: path, size and modification time of the file.
        step: the number of training steps; None if unknown.
        parameters: the number of parameters.
        layers: for each layer, the number of parameters and the shape of each tensor.
        norms: for each norm layer, gamma, beta and the running statistics of each
            channel; empty if the file does not store one number per channel.
        settings: values by flag, without `--`.
        data: the identity of the data, such as source and checksums, and what was found
            in them, such as the size of images.
        epochs, validations: the metrics of each.
        versions: versions of the packages, and the device and number of processes in
            training.

    Raises:
        UserError: the file does not exist, cannot be loaded safely, or is not a
            checkpoint that `fit` has written.
    """
    local, tensors, checkpoint = content.load(path)
    layers = _by_layer(tensors)
    recorded = records.recorded_in(checkpoint)
    data = experiment.data
    file = local.stat()
    return {
        "checkpoint": path,
        "bytes": file.st_size,
        "written": datetime.fromtimestamp(file.st_mtime).isoformat(sep=" ", timespec="seconds"),
        "step": checkpoint.get("global_step"),
        "parameters": sum(_parameter_count(tensors) for tensors in layers.values()),
        "layers": {layer: _described(tensors) for layer, tensors in layers.items()},
        "norms": _norm_values(layers, path),
        "settings": settings_in(checkpoint, (*data.machine_settings, *data.found_in_data)),
        "data": _identity(checkpoint, data, path) | _found_in_data(checkpoint, data),
        "epochs": recorded.get("epochs", []),
        "validations": recorded.get("validations", []),
        "versions": {"lightning": checkpoint.get("pytorch-lightning_version")}
        | checkpoint.get("between_steps", {}).get("surroundings", {}),
    }


def _found_in_data(checkpoint: Mapping[str, Any], data: type[DataModule]) -> dict[str, Any]:
    settings = checkpoint.get("datamodule_hyper_parameters", {})
    return {name: settings[name] for name in data.found_in_data if name in settings}


def _identity(checkpoint: Mapping[str, Any], data: type[DataModule], path: str) -> dict[str, Any]:
    try:
        return data.identity_in(checkpoint)
    except (TypeError, ValueError) as error:
        # Older versions saved it under another key, which `content` does not check.
        raise UserError(f"{path!r} is not a checkpoint of a run: {error}.") from error


def _by_layer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the parameters and buffers of each layer."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, tensor_name = name.removeprefix("network.").rpartition(".")
        layers.setdefault(layer, {})[tensor_name] = tensor
    return layers


def _described(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    count = {"parameters": _parameter_count(tensors)}
    # It comes first, and replaces the shape of a tensor of that name.
    return count | {name: list(tensor.shape) for name, tensor in tensors.items()} | count


def _is_norm(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether these are the parameters and buffers of a norm layer.

    The weight of a linear layer with one output has the shape of a norm's. Its bias
    does not: it has one element.
    """
    sizes = {tensors[name].numel() for name in ("weight", "bias") if name in tensors}
    return len(sizes) < 2 and recognition.are_channel_values(tensors.values())


def _norm_values(
    layers: Mapping[str, Mapping[str, Tensor]], path: str
) -> dict[str, dict[str, list[float]]]:
    norms = {layer: tensors for layer, tensors in layers.items() if _is_norm(tensors)}
    stored = {
        layer: tensors if all(map(content.is_stored, tensors.values())) else {}
        for layer, tensors in norms.items()
    }
    count = sum(tensor.numel() for tensors in stored.values() for tensor in tensors.values())
    if count > MAX_VALUES:
        raise UserError(
            f"{path!r} cannot be shown: its norm layers have {count:,} values, more than "
            f"{MAX_VALUES:,}."
        )
    return {
        layer: {name: v.tolist() for name, v in recognition.channel_values(tensors).items()}
        for layer, tensors in stored.items()
    }


def _parameter_count(tensors: Mapping[str, Tensor]) -> int:
    """Return the number of parameters of a layer, without its buffers.

    Buffers are recognized by their names, because a checkpoint does not mark them.
    """
    of_buffers = (*recognition.STATISTICS, "num_batches")
    return sum(
        tensor.numel()
        for name, tensor in tensors.items()
        if not any(word in name for word in of_buffers)
    )


def _print(found: Mapping[str, Any], experiment: Experiment) -> None:
    _print_line(f"{found['checkpoint']}: {found['bytes']:,} bytes, written {found['written']}")
    step = "unknown" if found["step"] is None else f"{found['step']:,}"
    _print_line(f"{found['parameters']:,} parameters, training step {step}")
    print()
    _print_layers(found)
    print()
    _print_metrics(found, experiment.task)
    settings = [[f"--{name}", json.dumps(value)] for name, value in found["settings"].items()]
    versions = [[name, str(value)] for name, value in found["versions"].items()]
    print()
    _print_table(("setting", "value"), [*settings, *_data_rows(found["data"]), *versions])


def _print_line(text: str) -> None:
    print(terminal.printable(_shortened(text)))


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    shown = [
        [*(_shortened(name, MAX_NAME) for name in names), _shortened(last)]
        for *names, last in rows[:MAX_ROWS]
    ]
    terminal.print_table(columns, shown, folds=len(columns) - 1)
    if len(rows) > MAX_ROWS:
        print(f"... and {len(rows) - MAX_ROWS:,} more rows, which --json prints")


def _shortened(text: str, limit: int = MAX_CHARACTERS) -> str:
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)"


def _print_layers(found: Mapping[str, Any]) -> None:
    layers = []
    for name, layer in found["layers"].items():
        shapes = (f"{key} {shape}" for key, shape in layer.items() if key != "parameters")
        layers.append([name, f"{layer['parameters']:,}", ", ".join(shapes)])
    _print_table(("layer", "parameters", "shapes"), layers)
    norms = []
    for layer, norm in found["norms"].items():
        norms += [[layer, name, _channels(values)] for name, values in norm.items()]
        if not norm:
            norms.append([layer, "", "not shown: the file does not store a number per channel"])
    if norms:
        print()
        _print_table(("norm", "tensor", "value of each channel"), norms)


def _channels(values: list[float]) -> str:
    shown = ", ".join(f"{value:.2f}" for value in values[:MAX_CHANNELS])
    if len(values) <= MAX_CHANNELS:
        return f"[{shown}]"
    spread = f"{min(values):.2f} to {max(values):.2f}"
    return f"[{shown}, ...], {len(values)} channels, {spread}"


def _print_metrics(found: Mapping[str, Any], task: type[Task]) -> None:
    epochs, validations = found["epochs"], found["validations"]
    if epochs:
        _print_line(f"last finished epoch ({len(epochs)}): train {_metrics(epochs[-1], 'train_')}")
    if validations:
        last = validations[-1]
        _print_line(f"last validation (step {last['step']:,}): {_metrics(last, 'val_')}")
    selects, _ = task.selects
    comparable = [metrics for metrics in validations if selects in metrics]
    if comparable:
        best = task.best(comparable)
        value = _metrics({selects: best[selects]}, "val_")
        _print_line(f"best validation (step {best['step']:,}): {value}")


def _metrics(metrics: Mapping[str, float], prefix: str) -> str:
    return ", ".join(
        f"{name.removeprefix(prefix).replace('_', ' ')} {value:.3f}"
        for name, value in metrics.items()
        if name != "step"
    )


def _data_rows(identity: Mapping[str, Any]) -> list[list[str]]:
    """Return table rows that identify the data, such as `data source` and `sha256 FILE`."""
    rows = []
    for name, value in identity.items():
        if isinstance(value, dict):
            rows += [[f"{name} {key}", str(inner)] for key, inner in value.items()]
        else:
            rows.append([f"data {name}", str(value)])
    return rows or [["data", "unknown"]]


def main(arguments: list[str], reference: str) -> None:
    """Run `inspect`. The first argument is the name of the command."""
    args = _parser().parse_args(arguments[1:])
    experiment = experiments.load(reference)
    path = args.ckpt
    run_result: dict[str, Any] = {}
    if args.run is not None:
        path, run_result = _load_run(Path(args.run), experiment)
    found = describe(path, experiment)
    if args.json:
        sys.stdout.writelines(
            result.json_chunks(found | {"result": run_result} if args.run else found)
        )
        print()
        return
    _print(found, experiment)
    if run_result:
        # The checksums are already in the table above.
        rows = [[n, str(value)] for n, value in run_result.items() if not n.startswith("sha256")]
        print()
        _print_table(("result.json", "value"), rows)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        f"{terminal.program()} inspect",
        description="Show the network, norms, settings, data and metrics of a checkpoint. Code in "
        "the file is not executed.",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "ckpt",
        nargs="?",
        metavar="CKPT",
        help="Checkpoint to show, for example runs/NAME/N/checkpoints/best.ckpt.",
    )
    which.add_argument(
        "--run",
        metavar="FOLDER",
        help="Folder of a run, for example runs/NAME/N. Its result.json and one checkpoint are "
        "shown: best.ckpt, or last.ckpt if there is no best.ckpt.",
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    return parser


def _load_run(run: Path, experiment: Experiment) -> tuple[str, dict[str, Any]]:
    """Return the path of a run's checkpoint, and the content of its result.json."""
    for name in ("best", "last"):
        file = run / "checkpoints" / f"{name}.ckpt"
        if file.is_file():
            return str(file), content.plain(result.read_result(run), str(run / "result.json"))
    raise UserError(
        f"There is no checkpoint in {str(run)!r}. Use the folder of a run, for example --run "
        f"runs/{experiment.name}/0"
    )
