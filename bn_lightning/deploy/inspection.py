"""What a checkpoint is, behind the command `inspect`. Nothing in the file is executed, and no network is built."""

import argparse
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from bn_lightning.errors import UserError
from bn_lightning.norms import recognition
from bn_lightning.runs import records
from bn_lightning.terminal import print_table
from bn_lightning.training import checkpoints

SHOWN = 6  # channels of a norm; the article's first layer has as many


def describe(path: str) -> dict[str, Any]:
    """What the checkpoint at `path` is, as plain data.

    Keys: `checkpoint`, its `bytes`, when it was `written`; `step`, None if unknown; `parameters`, and by
    layer its `layers`: their number and the shape of each; `norms`: gamma, beta and running statistics of each, by
    channel; `settings`, by their flags; `data`: the source of the images and their sha256; `epochs` and `validations`:
    the figures of each; `versions`, and where it was trained.

    Raises:
        UserError: no such file, or none that can be loaded safely.
    """
    local, checkpoint = checkpoints.load(path)
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in checkpoint["state_dict"].items():
        if not isinstance(value, Tensor):
            raise UserError(f"{path!r} holds no network: {name!r} in its 'state_dict' is a {type(value).__name__}.")
        layer, _, what = name.removeprefix("network.").rpartition(".")
        layers.setdefault(layer, {})[what] = value
    figures = records.kept_in(checkpoint)
    file = Path(local).stat()
    return {
        "checkpoint": path,
        "bytes": file.st_size,
        "written": datetime.fromtimestamp(file.st_mtime).isoformat(sep=" ", timespec="seconds"),
        "step": checkpoint.get("global_step"),
        "parameters": sum(_learned(values) for values in layers.values()),
        "layers": {
            name: {"parameters": _learned(values), **{what: list(value.shape) for what, value in values.items()}}
            for name, values in layers.items()
        },
        "norms": {
            name: {what: value.tolist() for what, value in recognition.by_channel(values).items()}
            for name, values in layers.items()
            if recognition.is_by_channel(values.values())
        },
        "settings": checkpoints.settings(checkpoint),
        "data": checkpoint.get("FashionMNIST", {}),
        "epochs": figures.get("epochs", []),
        "validations": figures.get("validations", []),
        "versions": {"lightning": checkpoint.get("pytorch-lightning_version")}
        | checkpoint.get("between_steps", {}).get("surroundings", {}),
    }


def _learned(values: dict[str, Tensor]) -> int:
    """Parameters among what a layer keeps; buffers are told by their names, for a file does not say which they are."""
    counted = (*recognition.STATISTICS, "num_batches")
    return sum(value.numel() for name, value in values.items() if not any(word in name for word in counted))


def _print(found: dict[str, Any]) -> None:
    print(f"{found['checkpoint']}: {found['bytes']:,} bytes, written {found['written']}")
    step = "an unknown step" if found["step"] is None else f"step {found['step']:,}"
    print(f"after {step}, {found['parameters']:,} parameters")
    lines = [
        [
            name,
            f"{layer['parameters']:,}",
            ", ".join(f"{what} {shape}" for what, shape in layer.items() if what != "parameters"),
        ]
        for name, layer in found["layers"].items()
    ]
    print()
    print_table(("layer", "parameters", "shapes"), lines, folds=2)
    if found["norms"]:
        kept = [[n, what, _channels(values)] for n, all_of in found["norms"].items() for what, values in all_of.items()]
        print()
        print_table(("norm", "keeps", "by channel"), kept, folds=2)
    print()
    if found["epochs"]:
        last = found["epochs"][-1]
        print(
            f"epoch {len(found['epochs'])}, finished: train loss {last['train_loss']:.3f}, acc {last['train_acc']:.3f}"
        )
    if found["validations"]:
        last, best = found["validations"][-1], max(found["validations"], key=lambda figures: figures["val_acc"])
        print(f"validation after step {last['step']:,}: loss {last['val_loss']:.3f}, acc {last['val_acc']:.3f}")
        print(f"best validation, after step {best['step']:,}: acc {best['val_acc']:.3f}")
    about = [[f"--{name}", json.dumps(value)] for name, value in found["settings"].items()]
    about += [["images from", found["data"].get("source", "unknown")]]
    about += [[f"sha256 {name}", digest] for name, digest in found["data"].get("sha256", {}).items()]
    about += [[name, str(value)] for name, value in found["versions"].items()]
    print()
    print_table(("setting", "value"), about, folds=1)


def _channels(values: list[float]) -> str:
    shown = ", ".join(f"{value:.2f}" for value in values[:SHOWN])
    if len(values) <= SHOWN:
        return f"[{shown}]"
    return f"[{shown}, ...], {len(values)} from {min(values):.2f} to {max(values):.2f}"


def main() -> None:
    """Run `inspect` with the arguments in sys.argv."""
    parser = argparse.ArgumentParser(
        "python -m bn_lightning inspect",
        description="What a checkpoint is: network, norms, settings, data, figures. Nothing in it is executed.",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("ckpt", nargs="?", metavar="CKPT", help="runs/NAME/N/checkpoints/best.ckpt")
    which.add_argument(
        "--run", metavar="FOLDER", help="runs/NAME/N: what it ended with, and the checkpoint that it kept"
    )
    parser.add_argument("--json", action="store_true", help="print one object, for programs")
    args = parser.parse_args(sys.argv[2:])
    path, result = args.ckpt, {}
    if args.run is not None:
        run = Path(args.run)
        path = next((str(f) for n in ("best", "last") if (f := run / "checkpoints" / f"{n}.ckpt").is_file()), None)
        if path is None:
            raise UserError(f"There is no checkpoint of a run in {args.run!r}. --run runs/lenet/0")
        result = records.read_result(run)
    found = describe(path)
    if args.json:
        print(records.to_json(found | {"result": result} if args.run else found))
        return
    _print(found)
    if result:
        print()
        rows = [[name, str(value)] for name, value in result.items() if not name.startswith("sha256")]  # said already
        print_table(("result of the run", "value"), rows, folds=1)
