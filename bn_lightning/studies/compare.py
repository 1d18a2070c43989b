"""`compare`: train variants with several seeds, and compare them in one table and a figure.

Each run is a whole `fit` in a folder of its own, `runs/NAME/VARIANT/seed-S/N`. With the same seed
all variants begin with the same weights and see the same samples in the same order. So they are
compared in pairs.
"""

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

from bn_lightning.errors import RunFailed
from bn_lightning.runs import experiment, process, records, result
from bn_lightning.studies import compare_report, study, variants, workers
from bn_lightning.studies.progress import StudyProgress
from bn_lightning.studies.statistics import Run, Selection
from bn_lightning.studies.variants import Variant
from bn_lightning.training import checkpoints


def main(arguments: list[str], reference: str) -> None:
    """Run the comparison; `arguments` begins with the command."""
    options, compared, common = variants.parse(arguments[1:])
    process.set_up()
    selection = Selection(*experiment.load(reference).task.selects)
    common = [*study.DEFAULTS, *common]
    plan = study.rehearse(reference, *(variant.arguments(common) for variant in compared))
    place = plan.root / options.name
    with study.alone_in(place):
        _keep_settings(place, compared, plan, selection)
        runs = _Comparison(place, options, compared, common, selection).train(reference)
        try:
            compare_report.write(place, runs, compared, selection, options.steps_to)
        except OSError as error:
            raise RunFailed(
                f"The table cannot be written to {place}: {error}. The same command repeats it."
            ) from error


def _keep_settings(
    place: Path, compared: Sequence[Variant], plan: study.Plan, selection: Selection
) -> None:
    """Store the settings of the variants, and refuse others under the same names."""
    file = place / "study.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    selects = {study.SELECTS: [selection.metric, selection.mode]}
    now: dict[str, Any] = {}
    for variant, settings in zip(compared, plan.settings, strict=True):
        now[variant.name] = json.loads(result.to_json(settings | selects))
        if variant.name in before:
            kept = before[variant.name]
            study.refuse_changes(str(place), kept, now[variant.name], plan.defaults | selects)
    result.write_json(file, before | now)


class _Comparison:
    """Trains each variant with each seed, unless it has been trained before."""

    def __init__(
        self,
        place: Path,
        options: argparse.Namespace,
        compared: Sequence[Variant],
        common: Sequence[str],
        selection: Selection,
    ) -> None:
        self.place, self.options, self.common = place, options, common
        self.selection = selection
        # Seed by seed, so that a comparison that is stopped has pairs.
        self.keys = [(variant, seed) for seed in range(options.seeds) for variant in compared]

    def train(self, reference: str) -> list[Run]:
        """Return all runs, after training those that have not ended yet."""
        ended = {key: self._read(*key) for key in self.keys}
        left = [key for key, run in ended.items() if run is None]
        if left:
            total, done = len(self.keys), len(self.keys) - len(left)
            with study.running(reference, self.options.jobs, total, done) as (pool, progress):
                futures = {
                    pool.threads.submit(self._fit, *key, pool, progress): key for key in left
                }
                for future in as_completed(futures):
                    ended[futures[future]] = future.result()
        return [run for run in ended.values() if run is not None]

    def _fit(
        self, variant: Variant, seed: int, pool: workers.Workers, progress: StudyProgress
    ) -> Run:
        key = variant.name, seed
        parent = _parent(variant, seed)
        name = Path(self.options.name, parent).as_posix()
        arguments = [*variant.arguments(self.common), "--seed_everything", str(seed)]
        arguments += ["--ckpt_path", "last", "--name", name]

        def advance(at: workers.Progress) -> bool:
            progress.advance(key, at.fraction)
            return True

        failure = "it left no result"
        try:
            pool.fit(arguments, self.place / parent / "log.txt", advance)
        except RunFailed as error:
            failure = str(error).splitlines()[0]
        run = self._read(variant, seed)
        if run is None:
            run = Run(variant.name, seed, str(self.place / parent), failure)
        progress.end(key, _line(run, self.selection))
        return run

    def _read(self, variant: Variant, seed: int) -> Run | None:
        """Return the run if it has ended, with a result or with a non-finite loss."""
        parent = self.place / _parent(variant, seed)
        finished = study.finished_run(parent)
        if finished is not None:
            _, checkpoint = checkpoints.load(str(finished / "checkpoints" / "last.ckpt"))
            recorded = records.recorded_in(checkpoint)
            return Run(
                variant.name,
                seed,
                str(finished),
                result=result.read_result(finished),
                epochs=recorded["epochs"],
                validations=recorded["validations"],
            )
        failed = study.failed_run(parent)
        if failed is None:
            return None
        folder, failure = failed
        return Run(variant.name, seed, str(folder), failure)


def _parent(variant: Variant, seed: int) -> Path:
    return Path(variant.folder, f"seed-{seed}")


def _line(run: Run, selection: Selection) -> str:
    """Return what is printed when a run has ended."""
    if run.failure is not None:
        return f"{run.variant}, seed {run.seed}: FAILED: {run.failure}"
    names = dict.fromkeys(("train_loss", selection.metric, selection.test_metric))
    values = {name: run.result.get(name) for name in names}
    shown = [
        f"{n.replace('_', ' ')} {value:.3f}" for n, value in values.items() if value is not None
    ]
    seconds = f"{run.result['train_seconds']:.0f} s"
    return f"{run.variant}, seed {run.seed}: {'  '.join(shown)}  {seconds}"
