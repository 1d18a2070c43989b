"""The command `inspect`: what a checkpoint is.

Nothing in the file is executed, and no network is built.
"""

import json
from argparse import ArgumentParser
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from bn_lightning import terminal
from bn_lightning.errors import UserError
from bn_lightning.norms import recognition
from bn_lightning.runs import experiment as experiments
from bn_lightning.runs import records, result
from bn_lightning.runs.experiment import Experiment
from bn_lightning.runs.settings import settings_in
from bn_lightning.training import checkpoints
from bn_lightning.training.task import Task

SHOWN = 6  # channels of a norm that are printed one by one


def describe(path: str, experiment: Experiment) -> dict[str, Any]:
    """Return what the checkpoint at `path` is, as plain data.

    Keys: `checkpoint`, its `bytes`, when it was `written`; `step`, None if unknown; `parameters`,
    and for each layer in `layers` their number and the shape of each; `norms`: gamma, beta and
    running statistics of each, by channel; `settings`, by their flags; `data`: what identifies the
    data; `epochs` and `validations`: the metrics of each; `versions`, and where it was trained.

    Raises:
        UserError: no such file, or one that cannot be loaded safely.
    """
    local, checkpoint = checkpoints.load(path)
    layers = _layers(path, checkpoint)
    recorded = records.recorded_in(checkpoint)
    file = Path(local).stat()
    return {
        "checkpoint": path,
        "bytes": file.st_size,
        "written": datetime.fromtimestamp(file.st_mtime).isoformat(sep=" ", timespec="seconds"),
        "step": checkpoint.get("global_step"),
        "parameters": sum(_learned(values) for values in layers.values()),
        "layers": {
            name: {
                "parameters": _learned(values),
                **{what: list(value.shape) for what, value in values.items()},
            }
            for name, values in layers.items()
        },
        "norms": {
            name: {what: value.tolist() for what, value in recognition.by_channel(values).items()}
            for name, values in layers.items()
            if _is_norm(values)
        },
        "settings": settings_in(checkpoint, experiment.data.machine_settings),
        "data": experiment.data.identity_in(checkpoint),
        "epochs": recorded.get("epochs", []),
        "validations": recorded.get("validations", []),
        "versions": {"lightning": checkpoint.get("pytorch-lightning_version")}
        | checkpoint.get("between_steps", {}).get("surroundings", {}),
    }


def _layers(path: str, checkpoint: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Return parameters and buffers by layer."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in checkpoint["state_dict"].items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"{path!r} holds no network: {name!r} in its 'state_dict' is a "
                f"{type(value).__name__}."
            )
        layer, _, what = name.removeprefix("network.").rpartition(".")
        layers.setdefault(layer, {})[what] = value
    return layers


def _is_norm(values: Mapping[str, Tensor]) -> bool:
    """Return whether these are the parameters and buffers of a norm layer.

    A linear layer with one output has a weight of the same shape, but a single bias.
    """
    sizes = {values[name].numel() for name in ("weight", "bias") if name in values}
    return len(sizes) < 2 and recognition.is_by_channel(values.values())


def _learned(values: Mapping[str, Tensor]) -> int:
    """Return the number of parameters among what a layer keeps.

    Buffers are recognized by their names, since a file does not say which they are.
    """
    counted = (*recognition.STATISTICS, "num_batches")
    return sum(
        value.numel() for name, value in values.items() if not any(word in name for word in counted)
    )


def _print(found: Mapping[str, Any], experiment: Experiment) -> None:
    print(f"{found['checkpoint']}: {found['bytes']:,} bytes, written {found['written']}")
    step = "an unknown step" if found["step"] is None else f"step {found['step']:,}"
    print(f"after {step}, {found['parameters']:,} parameters\n")
    _print_layers(found)
    print()
    _print_metrics(found, experiment.task)
    settings = [[f"--{name}", json.dumps(value)] for name, value in found["settings"].items()]
    versions = [[name, str(value)] for name, value in found["versions"].items()]
    print()
    rows = [*settings, *_data_rows(found["data"]), *versions]
    terminal.print_table(("setting", "value"), rows, folds=1)


def _print_layers(found: Mapping[str, Any]) -> None:
    layers = []
    for name, layer in found["layers"].items():
        shapes = (f"{what} {shape}" for what, shape in layer.items() if what != "parameters")
        layers.append([name, f"{layer['parameters']:,}", ", ".join(shapes)])
    terminal.print_table(("layer", "parameters", "shapes"), layers, folds=2)
    norms = [
        [name, what, _channels(values)]
        for name, norm in found["norms"].items()
        for what, values in norm.items()
    ]
    if norms:
        print()
        terminal.print_table(("norm", "keeps", "by channel"), norms, folds=2)


def _channels(values: list[float]) -> str:
    shown = ", ".join(f"{value:.2f}" for value in values[:SHOWN])
    if len(values) <= SHOWN:
        return f"[{shown}]"
    return f"[{shown}, ...], {len(values)} from {min(values):.2f} to {max(values):.2f}"


def _print_metrics(found: Mapping[str, Any], task: type[Task]) -> None:
    epochs, validations = found["epochs"], found["validations"]
    if epochs:
        print(f"epoch {len(epochs)}, finished: train {_metrics(epochs[-1], 'train_')}")
    if validations:
        last = validations[-1]
        print(f"validation after step {last['step']:,}: {_metrics(last, 'val_')}")
    selects, _ = task.selects
    comparable = [metrics for metrics in validations if selects in metrics]
    if comparable:
        best = task.best(comparable)
        value = _metrics({selects: best[selects]}, "val_")
        print(f"best validation, after step {best['step']:,}: {value}")


def _metrics(metrics: Mapping[str, float], prefix: str) -> str:
    return ", ".join(
        f"{name.removeprefix(prefix).replace('_', ' ')} {value:.3f}"
        for name, value in metrics.items()
        if name != "step"
    )


def _data_rows(identity: Mapping[str, Any]) -> list[list[str]]:
    """Return what identifies the data as rows of a table: `data source`, `sha256 FILE`."""
    rows = []
    for name, value in identity.items():
        if isinstance(value, dict):
            rows += [[f"{name} {key}", str(inner)] for key, inner in value.items()]
        else:
            rows.append([f"data {name}", str(value)])
    return rows or [["data", "unknown"]]


def main(arguments: list[str], reference: str) -> None:
    """Run `inspect`; `arguments` begins with the command."""
    args = _parser().parse_args(arguments[1:])
    experiment = experiments.load(reference)
    path = args.ckpt
    of_run: dict[str, Any] = {}
    if args.run is not None:
        path, of_run = _of_run(Path(args.run), experiment)
    found = describe(path, experiment)
    if args.json:
        print(result.to_json(found | {"result": of_run} if args.run else found))
        return
    _print(found, experiment)
    if of_run:
        # Checksums are in the table above.
        rows = [[n, str(value)] for n, value in of_run.items() if not n.startswith("sha256")]
        print()
        terminal.print_table(("result of the run", "value"), rows, folds=1)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        f"{terminal.program()} inspect",
        description="What a checkpoint is: network, norms, settings, data, metrics. Nothing in it "
        "is executed.",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("ckpt", nargs="?", metavar="CKPT", help="runs/NAME/N/checkpoints/best.ckpt")
    which.add_argument(
        "--run",
        metavar="FOLDER",
        help="runs/NAME/N: its result, and the checkpoint that it kept",
    )
    parser.add_argument("--json", action="store_true", help="print one object, for programs")
    return parser


def _of_run(run: Path, experiment: Experiment) -> tuple[str, dict[str, Any]]:
    """Return the checkpoint that a run has kept, and its result."""
    for name in ("best", "last"):
        file = run / "checkpoints" / f"{name}.ckpt"
        if file.is_file():
            return str(file), result.read_result(run)
    raise UserError(
        f"There is no checkpoint of a run in {str(run)!r}. --run runs/{experiment.name}/0"
    )
