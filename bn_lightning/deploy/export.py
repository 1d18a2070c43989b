"""The command `export`: a checkpoint as one file that runs without this project.

Norms are folded away where that is possible, and the file is verified before it is written.
"""

import inspect
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from bn_lightning import __version__, terminal
from bn_lightning.deploy import folding, formats
from bn_lightning.deploy.formats import Format
from bn_lightning.deploy.served import Restored, Run, Served, default_of, import_flags, restore
from bn_lightning.deploy.verification import Difference, Verification, metrics_of_test
from bn_lightning.errors import RunFailed, UserError, describe_error
from bn_lightning.runs import experiment as experiments
from bn_lightning.runs import records, result
from bn_lightning.runs.experiment import Experiment
from bn_lightning.training import checkpoints

# Settings of the data that are flags of `export`, where the data module has them.
DATA_FLAGS = {
    "source": "Of the test samples, as --data.source of fit.",
    "root": "The folder that keeps downloads.",
}


@dataclass(frozen=True)
class Exported:
    """What `export` found.

    Attributes:
        eager: the checkpoint's network.
        file: what the file computes.
        ckpt: the checkpoint's file.
        notes: those of `folding.fold`.
        parameters: of the file's network.
        source: where the test samples come from, if the data module says it.
        inputs: the raw test samples, (N, ...).
        difference: between the outputs of the two.
        metrics: of the test, by name: `test_acc`.
    """

    eager: Served
    file: Run
    ckpt: Path
    notes: list[str]
    parameters: int
    source: str | None
    inputs: Tensor
    difference: Difference
    metrics: dict[str, float]


# Some norms take disabled gradients as the sign of evaluation.
@torch.no_grad()
def export(
    ckpt_path: str,
    out: str | Path,
    reference: str,
    chosen: Mapping[str, str] | None = None,
    data_settings: Mapping[str, Any] | None = None,
) -> Exported:
    """Write a checkpoint's network to a file, once the file is proven to do what the network does.

    Its input are raw samples (N, ...), its outputs those of the network, for any N from 1. For a
    classifier they are named `images` and `logits`, else `inputs` and `outputs`.

    Args:
        ckpt_path: a file or an address.
        out: its suffix is one of `formats.FORMATS`. An older file is replaced at the end, or stays
            whole.
        reference, chosen, data_settings: see `served.restore`.

    Raises:
        UserError: another suffix, a package that is missing, or a checkpoint that cannot be
            exported.
        RunFailed: the file cannot be written, or does not do what the network does.
    """
    out = Path(out)
    form = _format_of(out)
    restored = restore(ckpt_path, reference, chosen, data_settings)
    data = restored.data
    data.prepare_data()
    data.setup("test")
    inputs, targets = data.test_samples()
    eager = restored.serve()
    verification = Verification(eager, inputs)
    if not verification.is_finite:
        raise RunFailed(
            f"{ckpt_path!r} gives {eager.output_name} that are no numbers: its training has "
            "diverged."
        )
    metrics = metrics_of_test(restored, inputs, targets)
    network, notes = folding.fold(eager.network, eager.preprocessing(inputs[:64].clone()))
    served = restored.serve(network)
    verification.refuse_difference("The folded network", served)
    about = _about(ckpt_path, restored) | metrics | {f"test_{eager.noun}": len(inputs)}
    # A .pt2 keeps its example: no sample of the data set is to be in it.
    content = _content(form, served, torch.zeros_like(data.example_input()), about)
    file = form.open(content)
    difference = verification.refuse_difference(f"The file for {out}", file)
    _write(out, content)
    return Exported(
        eager=eager,
        file=file,
        ckpt=restored.path,
        notes=notes,
        parameters=sum(p.numel() for p in network.parameters()),
        source=data.identity().get("source"),
        inputs=inputs,
        difference=difference,
        metrics=metrics,
    )


def _format_of(out: Path) -> Format:
    """Return the format of a file. One that cannot be written is refused before the work."""
    form = formats.of(out)
    if not out.parent.is_dir():
        raise UserError(f"There is no folder {str(out.parent)!r} to write {out.name} into.")
    form.refuse_missing_packages()
    return form


def _content(form: Format, served: Served, example: Tensor, about: Mapping[str, Any]) -> bytes:
    try:
        return form.write(served, example, about)
    except Exception as error:  # torch has no class of errors for code that it cannot export
        reason = describe_error(error)
        raise RunFailed(f"torch cannot export the network: {reason}") from error


def _write(out: Path, content: bytes) -> None:
    try:
        checkpoints.write_whole(out, content)
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunFailed(f"{out} cannot be written: {reason}. An older one is as it was.") from error


def _about(ckpt_path: str, restored: Restored) -> dict[str, Any]:
    """Return what the file says of itself; what is not known is left out."""
    checkpoint, data, task = restored.checkpoint, restored.data, restored.task
    step, (selects, _) = checkpoint.get("global_step"), task.selects
    validations = records.recorded_in(checkpoint).get("validations", [])
    folder = restored.path.absolute().parent.parent
    about = {
        # Lines can be read without a parser of JSON.
        "classes": None if data.classes is None else "\n".join(data.classes),
        "producer": f"bn_lightning {__version__}",
        "torch": str(torch.__version__),
        "checkpoint": _name_of(ckpt_path),
        "global_step": step,
        **task.facts(),
        "seed": checkpoint.get("datamodule_hyper_parameters", {}).get("seed"),
        **{f"data_{name}": value for name, value in data.identity_in(checkpoint).items()},
        selects: next((v.get(selects) for v in validations if v["step"] == step), None),
        "commit": result.read_result(folder).get("commit"),
    }
    return {name: value for name, value in about.items() if value is not None}


def _name_of(ckpt_path: str) -> str:
    """Return NAME/N/checkpoints/FILE of a checkpoint, without anybody's home or password."""
    path = Path(urlsplit(ckpt_path).path if "://" in ckpt_path else ckpt_path)
    if path.parent.name != "checkpoints":
        return path.name
    return "/".join([part for part in path.parts if part != path.anchor][-4:])


@torch.inference_mode()
def milliseconds(
    sides: Mapping[str, Run], inputs: Tensor, seconds: float, calls: int
) -> dict[str, list[float]]:
    """Measure the milliseconds of one call, once in each round that fits into `seconds`.

    The sides take turns: in every round each has a call to warm up and then some `calls`. There is
    at least one round.
    """
    times: dict[str, list[float]] = {side: [] for side in sides}
    end = time.perf_counter() + seconds
    while not all(times.values()) or time.perf_counter() < end:
        for side, run in sides.items():
            time.sleep(0.01)  # torch's threads keep spinning for a while
            run(inputs)
            start = time.perf_counter()
            for _ in range(calls):
                run(inputs)
            times[side].append((time.perf_counter() - start) * 1e3 / calls)
    return times


def main(arguments: list[str], reference: str) -> None:
    """Run `export CKPT OUT`: write the file, and print what was folded, proven and measured."""
    experiment = experiments.load(reference)
    args = _parser(experiment).parse_args(arguments[1:])
    flags = import_flags(experiment)
    given = {name: args[flag.removeprefix("--")] for name, flag in flags.items()}
    chosen = {name: value for name, value in given.items() if value is not None}
    data_settings = {name: args[name] for name in DATA_FLAGS if args.get(name) is not None}
    out = Path(args.out)
    done = export(args.ckpt, out, reference, chosen, data_settings)
    _print_findings(done, out)
    _print_times(done, out.name)


def _parser(experiment: Experiment) -> ArgumentParser:
    parser = ArgumentParser(
        prog=f"{terminal.program()} export",
        description="Make a file of a checkpoint that any runtime takes.",
    )
    parser.add_argument("ckpt", type=str, help="The checkpoint: runs/NAME/N/checkpoints/best.ckpt")
    parser.add_argument(
        "out",
        type=str,
        help="The file to write: model.onnx, or model.pt2 for torch.export.load",
    )
    for name, flag in import_flags(experiment).items():
        parser.add_argument(
            flag,
            type=str | None,
            default=None,
            help=f"The checkpoint's {name.partition('.')[2]}, if it is an import path.",
        )
    for name, text in DATA_FLAGS.items():
        if name in inspect.signature(experiment.data).parameters:
            default = experiment.defaults.get(f"data.{name}", default_of(experiment.data, name))
            parser.add_argument(f"--{name}", type=str, default=default, help=text)
    return parser


def _print_findings(done: Exported, out: Path) -> None:
    before = sum(p.numel() for p in done.eager.network.parameters())
    origin = f" ({done.source})" if done.source else ""
    largest, changed = done.difference
    classes = "" if changed is None else f", the class of {changed} {done.eager.noun}"
    metrics = ", ".join(f"{n.replace('_', ' ')} {value:.4f}" for n, value in done.metrics.items())
    print("\n".join(done.notes))
    print(
        f"{done.parameters:,} parameters, of {before:,}\n"
        f"{len(done.inputs):,} test {done.eager.noun}{origin}: {done.eager.output_name} differ by "
        f"at most {largest:.1e}{classes}" + (f"; {metrics}" if metrics else "") + "\n"
        f"{out}: {out.stat().st_size:,} bytes, of a checkpoint of {done.ckpt.stat().st_size:,}"
    )


def _print_times(done: Exported, name: str) -> None:
    sides: dict[str, Run] = {"eager": done.eager, name: done.file}
    rows = []
    for size, calls in ((1, 20), (256, 4)):
        inputs = done.inputs[:size]
        times = milliseconds(sides, inputs, 0.5, calls)
        rows.append(
            [f"{len(inputs)}", *(f"{statistics.median(values):.3f}" for values in times.values())]
        )
    print(f"\nmilliseconds, median, on {torch.get_num_threads()} threads")
    terminal.print_table((f"{done.eager.noun} at once", *sides), rows)
