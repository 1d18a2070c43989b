"""`compare`: train variants with several seeds, and compare them in tables and plots.

Each run is a complete `fit` in its own folder, `runs/NAME/VARIANT/seed-S/N`, or
`runs/NAME/VARIANT/seed-S/fold-F/N` if folds are varied. With the same seed and fold, all
variants start from the same weights and see the same samples in the same order. Variants
are therefore compared in pairs.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

from bn_lightning.errors import RunFailed, UserError
from bn_lightning.runs import experiment, process, records, result
from bn_lightning.runs.folder import flat
from bn_lightning.studies import (
    code,
    compare_report,
    repetitions,
    shared_settings,
    study,
    variants,
    workers,
)
from bn_lightning.studies.progress import StudyProgress
from bn_lightning.studies.repetitions import Repetition
from bn_lightning.studies.statistics import Run, Selection
from bn_lightning.studies.variants import Variant
from bn_lightning.training import checkpoints


def main(arguments: list[str], reference: str) -> None:
    """Run `compare`. The first of the arguments is the command.

    Raises:
        UserError: the options or settings are invalid.
        RunFailed: the tables or plots cannot be written.
    """
    process.set_up()
    loaded = experiment.load(reference)
    repeated = repetitions.declared_by(loaded.data)
    options, compared, common = variants.parse(arguments[1:], repeated)
    selection = Selection(*loaded.task.selects)
    common = [*study.DEFAULTS, *common]
    plan = _plan(reference, options.repetitions, compared, common)
    folder = plan.root / options.name
    # A variant has the same settings in each repetition, except for those that repeat it.
    varied = {name: "varied" for name, _ in options.repetitions[0].settings}
    settings = {
        variant.name: plan.settings[number] | varied for number, variant in enumerate(compared)
    }
    with study.locked(folder):
        _store_settings(folder, settings, plan.defaults, selection)
        codes = {name: code.identify(reference, own) for name, own in settings.items()}
        comparison = _Comparison(folder, options, compared, common, selection, codes)
        runs = comparison.train(reference, plan.gpus())
        try:
            # A second level of names: runs may share some of their `network_args`.
            of_runs = [flat(one) for one in plan.settings]
            shared = shared_settings.non_defaults(of_runs, flat(plan.defaults), study.DEFAULTS)
            compare_report.write(folder, runs, compared, selection, options.steps_to, shared)
        except OSError as error:
            raise RunFailed(
                f"The tables and plots cannot be written to {folder}: {error}\n"
                "Fix the cause, then run the same command again. It does not repeat the training."
            ) from error


def _plan(
    reference: str,
    repeated: Sequence[Repetition],
    compared: Sequence[Variant],
    common: Sequence[str],
) -> study.Plan:
    """Validate the settings of all runs, those of the first repetition of each variant first.

    The seed has no influence on whether settings are valid.

    Raises:
        UserError: the settings of a run are invalid, or two repetitions are the same.
    """
    folds = [one for one in repeated if one.seed == 0]
    names = [f"The variant {variant.name!r}" for variant in compared]
    if folds[0].settings:
        names = [f"{name}, {fold}," for fold in folds for name in names]
    runs = [[*variant.arguments(common), *fold.flags] for fold in folds for variant in compared]
    plan = study.plan_runs(reference, *runs, names=names)
    # `1` and `01` are the same fold.
    varied = [name for name, _ in folds[0].settings]
    values = [[one[name] for name in varied] for one in plan.settings[:: len(compared)]]
    if any(one in values[:number] for number, one in enumerate(values)):
        raise UserError(
            f"Two of the values of {' and '.join(f'--vary.{name}' for name in varied)} are the "
            "same, so that runs would be counted twice.\nRemove one of them."
        )
    return plan


def _store_settings(
    folder: Path,
    settings: Mapping[str, Mapping[str, Any]],
    defaults: Mapping[str, Any],
    selection: Selection,
) -> None:
    """Store the settings of each variant in study.json.

    Raises:
        UserError: a variant is already stored with other settings.
    """
    file = folder / "study.json"
    stored = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    selects = {study.SELECTS: [selection.metric, selection.mode]}
    current: dict[str, Any] = {}
    for name, own in settings.items():
        current[name] = json.loads(result.to_json({**own, **selects}))
        if name in stored:
            study.refuse_changes(str(folder), stored[name], current[name], {**defaults, **selects})
    result.write_json(file, stored | current)


class _Comparison:
    """Trains each variant with each repetition. Skips runs that are done.

    Args:
        codes: the current code of each variant.
    """

    def __init__(
        self,
        folder: Path,
        options: argparse.Namespace,
        compared: Sequence[Variant],
        common: Sequence[str],
        selection: Selection,
        codes: Mapping[str, code.Code],
    ) -> None:
        self.folder, self.options, self.common = folder, options, common
        self.selection, self.codes = selection, codes
        # All variants of one repetition come first, so that a stopped comparison already
        # has pairs.
        self.keys = [(variant, one) for one in options.repetitions for variant in compared]

    def train(self, reference: str, gpus: Sequence[str]) -> list[Run]:
        """Train the runs that are not done, and return all runs."""
        runs = {key: self._read(*key) for key in self.keys}
        is_repeated = self.options.rerun == "stale"
        remaining = [key for key, run in runs.items() if run is None or (run.stale and is_repeated)]
        if remaining:
            kept = [run for key, run in runs.items() if run and key not in remaining]
            print(compare_report.describe_stale(kept), end="", flush=True)
            total, done = len(self.keys), len(self.keys) - len(remaining)
            jobs = self.options.jobs
            with study.start_workers(reference, jobs, total, done, gpus) as (pool, progress):
                futures = {
                    pool.threads.submit(self._fit, *key, pool, progress): key for key in remaining
                }
                for future in as_completed(futures):
                    runs[futures[future]] = future.result()
        return [run for run in runs.values() if run is not None]

    def _fit(
        self,
        variant: Variant,
        repetition: Repetition,
        pool: workers.Workers,
        progress: StudyProgress,
    ) -> Run:
        """Train one run in a worker. A failure is part of the returned run, not an exception."""
        key = variant.name, repetition
        parent = _parent(variant, repetition)
        study.set_aside_stale_runs(self.folder / parent, self.codes[variant.name])
        name = Path(self.options.name, parent).as_posix()
        arguments = [*variant.arguments(self.common), *repetition.flags]
        arguments += ["--seed_everything", str(repetition.seed)]
        arguments += ["--ckpt_path", "last", "--name", name]

        def advance(at: workers.Progress) -> bool:
            progress.advance(key, at.fraction)
            return True

        failure = "The run has no result."
        try:
            study.fit(pool, arguments, self.folder / parent / "log.txt", advance)
        except workers.MachineFailure as error:
            if error.is_disk_full:
                raise RunFailed(study.describe_full_disk(error)) from error
            failure = str(error).splitlines()[0]
        except RunFailed as error:
            failure = str(error).splitlines()[0]
        run = self._read(variant, repetition)
        if run is None:
            run = Run(variant.name, repetition, str(self.folder / parent), failure)
        progress.end(key, _line(run, self.selection))
        return run

    def _read(self, variant: Variant, repetition: Repetition) -> Run | None:
        """Return the run if it is done: with a result, or stopped by a non-finite loss."""
        parent = self.folder / _parent(variant, repetition)
        current = self.codes[variant.name]
        finished = study.finished_run(parent)
        if finished is not None:
            _, checkpoint = checkpoints.load(str(finished / "checkpoints" / "last.ckpt"))
            recorded = records.recorded_in(checkpoint)
            return Run(
                variant.name,
                repetition,
                str(finished),
                result=result.read_result(finished),
                epochs=recorded["epochs"],
                validations=recorded["validations"],
                stale=current.difference(code.recorded(finished)),
            )
        failed = study.failed_run(parent)
        if failed is None:
            return None
        folder, failure = failed
        stale = current.difference(code.recorded(folder))
        return Run(variant.name, repetition, str(folder), failure, stale=stale)


def _parent(variant: Variant, repetition: Repetition) -> Path:
    return Path(variant.folder, repetition.folder)


def _line(run: Run, selection: Selection) -> str:
    """Return the line that is printed when a run is done."""
    title = f"{run.variant}, {run.repetition}"
    if run.failure is not None:
        return f"{title}: FAILED: {run.failure}"
    names = dict.fromkeys(("train_loss", selection.metric, selection.test_metric))
    values = {name.replace("_", " "): run.result.get(name) for name in names}
    shown = [f"{name} {value:.3f}" for name, value in values.items() if value is not None]
    return f"{title}: {'  '.join(shown)}  {run.result['train_seconds']:.0f} s"
