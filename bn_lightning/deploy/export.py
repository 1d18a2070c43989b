"""The command `export`: write the network of a checkpoint to a file that needs no project code.

Norm layers are folded into the layers before them if possible. The file is verified on
the test set before it is written.
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
from bn_lightning.deploy.served import (
    Forward,
    Restored,
    Served,
    default_of,
    import_flags,
    restore,
)
from bn_lightning.deploy.verification import Difference, Verification, compute_test_metrics
from bn_lightning.errors import RunFailed, UserError, describe_error
from bn_lightning.runs import experiment as experiments
from bn_lightning.runs import records, result
from bn_lightning.runs.experiment import Experiment
from bn_lightning.training import checkpoints

# Settings of the data module that are flags of `export`, with their help. A flag is
# added only if the data module has the setting.
DATA_FLAGS = {
    "source": "Source of the test samples; same values as --data.source of fit.",
    "root": "Folder that is searched for the files, and to which they are downloaded.",
}

# Duration of the timing for each batch size.
TIMING_SECONDS = 0.5


@dataclass(frozen=True)
class Exported:
    """The result of `export`.

    Attributes:
        eager: the checkpoint's network.
        file: the function that the exported file computes.
        ckpt: the local checkpoint file.
        notes: the notes of `folding.fold`.
        parameters: the number of parameters in the exported file.
        source: the source of the test samples, or None if the data module does not
            state it.
        inputs: the raw test samples, (N, ...).
        difference: the difference between the outputs of `eager` and `file`.
        metrics: test metrics by name, such as `test_acc`.
    """

    eager: Served
    file: Forward
    ckpt: Path
    notes: list[str]
    parameters: int
    source: str | None
    inputs: Tensor
    difference: Difference
    metrics: dict[str, float]


# Some norms, such as the article's, use the running statistics only if gradients are
# disabled.
@torch.no_grad()
def export(
    ckpt_path: str,
    out: str | Path,
    reference: str,
    trusted: Mapping[str, str] | None = None,
    data_settings: Mapping[str, Any] | None = None,
) -> Exported:
    """Export the network of a checkpoint, after verifying the exported outputs on the test set.

    The exported file accepts raw samples (N, ...) for any N from 1, and returns the
    outputs of the network. The input and the output are named `images` and `logits` for
    a classifier, otherwise `inputs` and `outputs`.

    Args:
        ckpt_path: a path or URL.
        out: the file to write. Its suffix is one of `formats.FORMATS`. An existing file
            is replaced atomically at the end. After an error it is unchanged.
        reference, trusted, data_settings: see `served.restore`.

    Raises:
        UserError: the suffix is unknown, a package is missing, or the checkpoint does
            not match the experiment.
        RunFailed: the file cannot be written, or its outputs differ from those of the
            network.
    """
    out = Path(out)
    form = _checked_format(out)
    restored = restore(ckpt_path, reference, trusted, data_settings)
    data = restored.data
    data.prepare_data()
    data.setup("test")
    inputs, targets = data.test_samples()
    eager = restored.serve()
    verification = Verification(eager, inputs)
    if not verification.is_finite:
        raise RunFailed(
            f"The network in {ckpt_path!r} returns {eager.output_name} that are NaN or infinite: "
            "its training diverged. Choose another checkpoint."
        )
    metrics = compute_test_metrics(restored, inputs, targets)
    network, notes = folding.fold(eager.network, eager.preprocessing(inputs[:64].clone()))
    served = restored.serve(network)
    verification.verify("The folded network", served)
    test_results = metrics | {f"test_{eager.sample_noun}": len(inputs)}
    metadata = _metadata(ckpt_path, restored) | test_results
    # A .pt2 file stores its example input, which should not be a sample of the data
    # set.
    example = torch.zeros_like(data.example_input())
    content = _serialize(form, served, example, metadata)
    file = form.open(content)
    difference = verification.verify(f"The network exported for {out}", file)
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


def _checked_format(out: Path) -> Format:
    """Return the format of a file, and raise UserError if the file could not be written."""
    form = formats.format_of(out)
    if not out.parent.is_dir():
        raise UserError(f"There is no folder {str(out.parent)!r} for {out.name}. Create it first.")
    form.refuse_missing_packages()
    return form


def _serialize(form: Format, served: Served, example: Tensor, metadata: Mapping[str, Any]) -> bytes:
    try:
        return form.write(served, example, metadata)
    except Exception as error:
        # torch raises errors of many classes for code that it cannot export.
        reason = describe_error(error)
        raise RunFailed(
            f"torch cannot export the network: {reason}\nNo file was written."
        ) from error


def _write(out: Path, content: bytes) -> None:
    try:
        checkpoints.write_atomically(out, content)
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunFailed(f"Cannot write {out}: {reason}. An existing file is unchanged.") from error


def _metadata(ckpt_path: str, restored: Restored) -> dict[str, Any]:
    """Return the metadata of the exported file. Unknown values are left out."""
    checkpoint, data, task = restored.checkpoint, restored.data, restored.task
    step, (selects, _) = checkpoint.get("global_step"), task.selects
    validations = records.recorded_in(checkpoint).get("validations", [])
    folder = restored.path.absolute().parent.parent
    metadata = {
        # One class per line, so that no JSON parser is needed.
        "classes": None if data.classes is None else "\n".join(data.classes),
        "producer": f"bn_lightning {__version__}",
        "torch": str(torch.__version__),
        "checkpoint": _public_name(ckpt_path),
        "global_step": step,
        **task.facts(),
        "seed": checkpoint.get("datamodule_hyper_parameters", {}).get("seed"),
        **{f"data_{name}": value for name, value in data.identity_in(checkpoint).items()},
        selects: next((v.get(selects) for v in validations if v["step"] == step), None),
        "commit": result.read_result(folder).get("commit"),
    }
    return {name: value for name, value in metadata.items() if value is not None}


def _public_name(ckpt_path: str) -> str:
    """Return NAME/N/checkpoints/FILE, without home directory, host, password and query."""
    path = Path(urlsplit(ckpt_path).path if "://" in ckpt_path else ckpt_path)
    if path.parent.name != "checkpoints":
        return path.name
    return "/".join([part for part in path.parts if part != path.anchor][-4:])


@torch.inference_mode()
def milliseconds(
    networks: Mapping[str, Forward], inputs: Tensor, seconds: float, calls: int
) -> dict[str, list[float]]:
    """Measure the milliseconds per call of each network, in rounds that take about `seconds`.

    In each round, the networks take turns. Each has one warm-up call and then `calls`
    timed calls. There is at least one round.

    Returns:
        For each network, the mean milliseconds per call in each round.
    """
    times: dict[str, list[float]] = {name: [] for name in networks}
    end = time.perf_counter() + seconds
    while not all(times.values()) or time.perf_counter() < end:
        for name, forward in networks.items():
            # torch's threads stay busy for a short time after a call and would slow the
            # next one.
            time.sleep(0.01)
            forward(inputs)
            start = time.perf_counter()
            for _ in range(calls):
                forward(inputs)
            times[name].append((time.perf_counter() - start) * 1e3 / calls)
    return times


def main(arguments: list[str], reference: str) -> None:
    """Run `export CKPT OUT`: write the file, and print folded norms, differences and timings."""
    experiment = experiments.load(reference)
    args = _parser(experiment).parse_args(arguments[1:])
    flags = import_flags(experiment)
    values = {name: args[flag.removeprefix("--")] for name, flag in flags.items()}
    trusted = {name: value for name, value in values.items() if value is not None}
    data_settings = {name: args[name] for name in DATA_FLAGS if args.get(name) is not None}
    out = Path(args.out)
    exported = export(args.ckpt, out, reference, trusted, data_settings)
    _print_report(exported, out)
    _print_times(exported, out.name)


def _parser(experiment: Experiment) -> ArgumentParser:
    parser = ArgumentParser(
        prog=f"{terminal.program()} export",
        description="Write the network of a checkpoint to a file that runs without this project.",
    )
    parser.add_argument(
        "ckpt",
        type=str,
        help="Checkpoint to read, for example runs/NAME/N/checkpoints/best.ckpt.",
    )
    parser.add_argument(
        "out",
        type=str,
        help="File to write: model.onnx, or model.pt2 for torch.export.load.",
    )
    for name, flag in import_flags(experiment).items():
        parser.add_argument(
            flag,
            f"--{name.partition('.')[2]}",
            type=str | None,
            default=None,
            help=f"The {name.partition('.')[2]} of the checkpoint. Required only if it is an "
            "import path, to confirm that you trust the code.",
        )
    for name, text in DATA_FLAGS.items():
        if name in inspect.signature(experiment.data).parameters:
            default = experiment.defaults.get(f"data.{name}", default_of(experiment.data, name))
            parser.add_argument(f"--{name}", type=str, default=default, help=text)
    return parser


def _print_report(exported: Exported, out: Path) -> None:
    eager, (largest, allowed, changed) = exported.eager, exported.difference
    unfolded = sum(p.numel() for p in eager.network.parameters())
    source = f" ({exported.source})" if exported.source else ""
    classes = "" if changed is None else f", {changed} predicted classes differ"
    metrics = ", ".join(
        f"{n.replace('_', ' ')} {value:.4f}" for n, value in exported.metrics.items()
    )
    for note in exported.notes:
        print(note)
    print(f"{exported.parameters:,} parameters (checkpoint: {unfolded:,})")
    print(
        f"{len(exported.inputs):,} test {eager.sample_noun}{source}: {eager.output_name} differ by "
        f"at most {largest:.1e} (allowed: {allowed:.1e}){classes}"
        + (f"; {metrics}" if metrics else "")
    )
    print(f"{out}: {out.stat().st_size:,} bytes (checkpoint: {exported.ckpt.stat().st_size:,})")


def _print_times(exported: Exported, name: str) -> None:
    networks: dict[str, Forward] = {"eager": exported.eager, name: exported.file}
    rows = []
    for size, calls in ((1, 20), (256, 4)):
        inputs = exported.inputs[:size]
        times = milliseconds(networks, inputs, TIMING_SECONDS, calls)
        medians = [f"{statistics.median(values):.3f}" for values in times.values()]
        rows.append([f"{len(inputs)}", *medians])
    threads = torch.get_num_threads()
    print(f"\nmedian milliseconds per call, {threads} thread{'s' * (threads > 1)}")
    terminal.print_table((f"{exported.eager.sample_noun} per call", *networks), rows)
