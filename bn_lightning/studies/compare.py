"""`compare`: the same runs with several norms or settings and several seeds, in one table and a figure.

Each run is a whole `fit` in a folder of its own, `runs/NAME/CHOICE/seed-S/N`. With a seed all choices begin with the
same weights and see the same images in the same order, so they are compared in pairs.
"""

import argparse
import io
import itertools
import json
import math
import re
import sys
from collections.abc import Sequence
from concurrent.futures import as_completed
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from bn_lightning import terminal
from bn_lightning.errors import RunFailed, UserError
from bn_lightning.runs import records, run
from bn_lightning.studies import plots, statistics, study, workers
from bn_lightning.studies.statistics import Run
from bn_lightning.training import checkpoints

HELP = """\
Every setting of fit is one of compare too, and holds for all runs: --config configs/article.yaml
--trainer.max_epochs 3. A run that was begun before is gone on with, one that is finished is not repeated.
"""


@dataclass(frozen=True)
class Choice:
    """One thing that is compared: its name, the choice that it is held to, and the settings that make it."""

    name: str
    reference: str
    configs: tuple[str, ...]
    settings: tuple[tuple[str, str], ...]

    def arguments(self, common: Sequence[str]) -> list[str]:
        """For `fit`: later ones are stronger, and a config of the choice's own is weaker than what is typed."""
        configs = [argument for config in self.configs for argument in ("--config", config)]
        return [*configs, *common, *(text for name, value in self.settings for text in (f"--{name}", value))]


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[Choice], list[str]]:
    """What is typed: options of `compare`, choices, and settings of all runs."""
    parser = argparse.ArgumentParser(
        "python -m bn_lightning compare",
        usage="%(prog)s [--norm NAME ...] [--vary.SETTING VALUE ...] [--ablate.SETTING VALUE ...] [--seeds N] "
        "[settings of fit]",
        description=__doc__.partition("\n")[0].partition(": ")[2] if __doc__ else None,
        epilog=HELP,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--norm", nargs="+", help="Norms: names, or import paths.", metavar="NAME")
    parser.add_argument(
        "--vary.SETTING", nargs="+", metavar="VALUE", help="Values of any setting, each with all others of the grid."
    )
    parser.add_argument(
        "--ablate.SETTING", nargs="+", metavar="VALUE", help="Values of any setting, each alone changed in the grid."
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="Seeds 0 to N-1 (3).")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="Runs at once, the cores divided among them (1)."
    )
    parser.add_argument("--name", default="compare", help="The runs lie in runs/NAME; another study, another name.")
    parser.add_argument("--steps_to", type=float, metavar="ACCURACY", help="Validation accuracy to count steps to.")
    varied = [text.partition("=")[0] for text in arguments if text.startswith(("--vary.", "--ablate."))]
    for option in dict.fromkeys(varied):
        parser.add_argument(option, nargs="+", dest=option, help=argparse.SUPPRESS)
    try:
        options, common = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}\nAll options: {parser.prog} --help") from error
    for name, least in (("seeds", 1), ("jobs", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} is {getattr(options, name)}; it must be at least {least}.")
    given = {option: getattr(options, option) for option in dict.fromkeys(varied)}
    names = [option.partition(".")[2] for option in given]
    for name in ("seed_everything", "name", "ckpt_path", "trainer.default_root_dir"):
        if name in names:
            raise UserError(f"{name} cannot be varied. Seeds: --seeds N. Another study: --name NAME")
    if options.norm and "model.norm" in names:
        raise UserError("Norms are given once: --norm NAME ...")
    typed = {text.partition("=")[0] for text in common}
    if "--seed_everything" in typed or ("--model.norm" in typed and options.norm):
        raise UserError(
            "What is compared is given by --norm NAME ... and --seeds N, not --model.norm, --seed_everything."
        )
    grid = {"model.norm": options.norm} if options.norm else {}
    grid |= {option.removeprefix("--vary."): values for option, values in given.items() if "--vary." in option}
    ablated = {option.removeprefix("--ablate."): values for option, values in given.items() if "--ablate." in option}
    return options, choices(grid, ablated), common


def choices(grid: dict[str, list[str]], ablated: dict[str, list[str]]) -> list[Choice]:
    """The whole grid; then, for its first point, each ablated value alone.

    Each is held to the first norm with the same other settings; where there is but one norm, to the first point.
    """
    points = [tuple(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    norms = grid.get("model.norm", [])
    first = points[:1] * len(points)
    if len(norms) > 1:
        first = [tuple((n, norms[0] if n == "model.norm" else value) for n, value in point) for point in points]
    ablations = [(*points[0], (name, value)) for name, values in ablated.items() for value in values]
    short = study.short({**grid, **ablated})

    def said(name: str, value: str) -> str:
        if name == "model.norm":
            return value
        if name == "config":
            return Path(value).stem
        return f"{short[name]}={value}"

    def named(point: tuple[tuple[str, str], ...]) -> str:
        return " ".join(said(*pair) for pair in point) or "base"

    found: dict[str, Choice] = {}
    for point, reference in [*zip(points, first, strict=True), *((ablation, points[0]) for ablation in ablations)]:
        name = named(point)
        if _as_folder(name).casefold() in map(str.casefold, map(_as_folder, found)):
            raise UserError(f"There are two choices {name!r}, whose runs would lie in the same folder.")
        configs = tuple(value for key, value in point if key == "config")
        found[name] = Choice(name, named(reference), configs, tuple(pair for pair in point if pair[0] != "config"))
    return list(found.values())


def main() -> None:
    """Run the comparison in sys.argv."""
    options, compared, common = parse(sys.argv[2:])
    run.set_up()
    common = [*study.DEFAULTS, *common]
    root, settings = study.rehearse(*(choice.arguments(common) for choice in compared))
    place = root / options.name
    with study.alone_in(place):
        _settle(place, dict(zip((choice.name for choice in compared), settings, strict=True)))
        tasks = {(choice.name, seed): choice for seed in range(options.seeds) for choice in compared}
        known = {key: _read(place, *key) for key in tasks}
        open_tasks = [key for key, done in known.items() if done is None]
        if open_tasks:
            with study.running(options.jobs, len(tasks), len(tasks) - len(open_tasks)) as (pool, board):

                def do(key: tuple[str, int]) -> Run:
                    name, seed = key
                    parent = Path(_as_folder(name), f"seed-{seed}")
                    arguments = tasks[key].arguments(common)
                    arguments += ["--seed_everything", str(seed), "--ckpt_path", "last"]
                    arguments += ["--name", Path(options.name, parent).as_posix()]
                    failure = None

                    def go_on(at: workers.Progress) -> bool:
                        board.advance(key, at.fraction)
                        return True

                    try:
                        pool.fit(arguments, place / parent / "log.txt", go_on)
                    except RunFailed as error:
                        failure = str(error).splitlines()[0]
                    done = _read(place, name, seed) or Run(
                        name, seed, str(place / parent), failure or "it left no result"
                    )
                    board.end(key, _line(done))
                    return done

                for future in as_completed([pool.threads.submit(do, key) for key in open_tasks]):
                    done = future.result()
                    known[done.choice, done.seed] = done
        try:
            _report(place, [done for done in known.values() if done is not None], compared, options.steps_to)
        except OSError as error:
            raise RunFailed(
                f"The table cannot be written to {place}: {error}. The same command makes it anew."
            ) from error


def _settle(place: Path, settings: dict[str, dict[str, Any]]) -> None:
    """Keep the settings of the choices; refuse others under the same names."""
    file = place / "study.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    now = json.loads(records.to_json(settings))
    for name in now.keys() & before.keys():
        study.refuse_changes(str(place), before[name], now[name])
    records.write_json(file, before | now)


def _as_folder(name: str) -> str:
    return re.sub(r"[^\w.,=+-]+", ",", name)


def _read(place: Path, name: str, seed: int) -> Run | None:
    """The run, if it has come to its end, good or bad."""
    parent = place / _as_folder(name) / f"seed-{seed}"
    done = study.finished_run(parent)
    if done is not None:
        kept = records.kept_in(checkpoints.load(str(done / "checkpoints" / "last.ckpt"))[1])
        return Run(name, seed, str(done), None, records.read_result(done), kept["epochs"], kept["validations"])
    failed = study.failed_run(parent)
    return None if failed is None else Run(name, seed, str(failed[0]), failed[1])


def _line(done: Run) -> str:
    if done.failure is not None:
        return f"{done.choice}, seed {done.seed}: FAILED: {done.failure}"
    shown = ("train_loss", "val_acc", "test_acc")
    figures = [f"{name.replace('_', ' ')} {done.result[name]:.3f}" for name in shown if done.result[name] is not None]
    return f"{done.choice}, seed {done.seed}: {'  '.join(figures)}  {done.result['train_seconds']:.0f} s"


def _report(place: Path, runs: list[Run], compared: list[Choice], accuracy: float | None) -> None:
    """Print the table, and leave it in the study's folder in all its forms, with its runs and pictures."""
    if accuracy is None:
        accuracy = _reached_by_all(runs)
    shown = statistics.figures(runs, accuracy)
    references = {choice.name: choice.reference for choice in compared}
    rows = statistics.rows(runs, shown, references)
    heads, texts = {}, {}
    for figure in shown:
        heads[figure.name] = statistics.columns(figure.name, set(references.values()))
        texts[figure.name] = [statistics.cells(row, figure.digits) for row in rows if row.figure == figure.name]
    failures = [f"{run.choice}, seed {run.seed}: {run.failure} ({run.folder})" for run in runs if run.failure]
    of_runs = [
        {"choice": run.choice, "seed": run.seed, "folder": run.folder, "failure": run.failure}
        | {figure.name: figure.of(run) for figure in shown}
        for run in runs
    ]
    table = "\n".join(statistics.markdown(heads[name], texts[name]) for name in texts)
    table += "".join(f"\n- failed: {line}" for line in failures)
    files = {
        "table.md": table,
        "table.csv": statistics.as_csv([asdict(row) for row in rows]),
        "runs.csv": statistics.as_csv(of_runs),
        "table.json": records.to_json({"rows": [asdict(row) for row in rows], "runs": of_runs}) + "\n",
    }
    with redirect_stdout(io.StringIO()) as printed:
        for name in texts:
            terminal.print_table(heads[name], texts[name])
            print()
        for line in failures:
            print(f"failed: {line}")
    files["table.txt"] = printed.getvalue()
    print(printed.getvalue(), end="")
    for name, content in files.items():
        checkpoints.write_whole(place / name, content.encode())
    plots.learning_curves(runs, place / "curves.png")
    for name, lines in _against(runs, compared).items():
        plots.against(name, lines, place / f"{name}.png")
    print(f"{len(runs)} runs, {len(failures)} failed; table, runs and pictures are in {place}", flush=True)


def _reached_by_all(runs: list[Run]) -> float | None:
    """The mean accuracy with which the choice ends that ends lowest, rounded down: each has come there."""
    last: dict[str, list[float]] = {}
    for done in runs:
        if done.validations:
            last.setdefault(done.choice, []).append(done.validations[-1]["val_acc"])
    lowest = min(map(fmean, last.values()), default=0.0)
    return math.floor(lowest * 200) / 200 or None


def _against(runs: list[Run], compared: list[Choice]) -> dict[str, dict[str, list[tuple[float, list[Run]]]]]:
    """For each setting that has several values, all numbers: by the others a line of points, in its order."""
    found: dict[str, dict[str, list[tuple[float, list[Run]]]]] = {}
    for name in dict.fromkeys(key for choice in compared for key, _ in choice.settings):
        lines: dict[str, list[tuple[float, list[Run]]]] = {}
        for choice in compared:
            value = dict(choice.settings).get(name, "")
            if not _is_number(value):
                break
            others = " ".join(v for key, v in choice.settings if key != name)
            lines.setdefault(others, []).append((float(value), [r for r in runs if r.choice == choice.name]))
        else:
            if any(len(points) > 1 for points in lines.values()):
                found[name] = {others: sorted(points, key=lambda point: point[0]) for others, points in lines.items()}
    return found


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
