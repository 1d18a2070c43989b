"""The variants of a comparison, defined by the options of `compare`."""

import argparse
import itertools
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bn_lightning import terminal
from bn_lightning.errors import UserError
from bn_lightning.studies import repetitions, study
from bn_lightning.studies.repetitions import Point

DESCRIPTION = "Train norms or settings with several seeds, and compare them in tables and plots."
EPILOG = """\
All settings of fit are accepted, and apply to all runs. For example: --config configs/X.yaml
--trainer.max_epochs 3. The same command resumes a comparison: it resumes unfinished runs, and
skips finished ones.
"""

NORM = "model.norm"
SEEDS = 3


@dataclass(frozen=True)
class Variant:
    """Settings that are trained with each seed, and each fold if folds are varied.

    Attributes:
        name: name in tables and plots.
        baseline: name of the variant that this one is compared with.
        configs: config files that only this variant uses.
        settings: varied settings and their values.
    """

    name: str
    baseline: str
    configs: tuple[str, ...]
    settings: Point

    @property
    def folder(self) -> str:
        """The name of the folder that contains the runs."""
        name = re.sub(r"[^\w.,=+-]+", ",", self.name)
        # File systems allow 255 bytes. The value of a setting may be a long list.
        return name if len(name) <= 200 else f"{name[:190]},{zlib.crc32(name.encode()):08x}"

    def arguments(self, common: Sequence[str]) -> list[str]:
        """Return the arguments of `fit`. Later arguments override earlier ones.

        Common arguments override the configs of the variant, and its settings override
        both.
        """
        configs = [text for config in self.configs for text in ("--config", config)]
        settings = [text for name, value in self.settings for text in (f"--{name}", value)]
        return [*configs, *common, *settings]


def parse(
    arguments: Sequence[str], repeated: Sequence[str] = ()
) -> tuple[argparse.Namespace, list[Variant], list[str]]:
    """Return the options of `compare`, the variants, and the settings that all runs share.

    The options include the `repetitions` of each variant.

    Args:
        repeated: settings whose values are repetitions, such as `data.fold`.

    Raises:
        UserError: the options are invalid.
    """
    parser = _parser()
    flags = [text.partition("=")[0] for text in arguments]
    prefixes = ("--vary.", "--ablate.")
    varied = dict.fromkeys(flag for flag in flags if flag.startswith(prefixes))
    for flag in varied:
        parser.add_argument(flag, nargs="+", dest=flag, help=argparse.SUPPRESS)
    try:
        options, common = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}\nFor all options, see: {parser.prog} --help") from error
    _check(options, varied, common, repeated)
    grid: dict[str, list[str]] = {NORM: options.norm} if options.norm else {}
    ablated: dict[str, list[str]] = {}
    for flag in varied:
        kind, _, name = flag.partition(".")
        (grid if kind == "--vary" else ablated)[name] = getattr(options, flag)
    folds = {name: grid.pop(name) for name in repeated if name in grid}
    # Folds already repeat the runs. More seeds multiply the cost.
    seeds = options.seeds or (1 if folds else SEEDS)
    options.repetitions = repetitions.product(seeds, folds)
    return options, variants(grid, ablated), common


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        f"{terminal.program()} compare",
        usage="%(prog)s [--norm NAME ...] [--vary.SETTING VALUE ...]\n"
        "           [--ablate.SETTING VALUE ...] [--seeds N] [options] [settings of fit]",
        description=DESCRIPTION,
        epilog=EPILOG,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument(
        "--norm",
        nargs="+",
        metavar="NAME",
        help="Norms to compare, by name or import path; the first one is the baseline.",
    )
    parser.add_argument(
        "--vary.SETTING",
        nargs="+",
        metavar="VALUE",
        help="Values for one setting; several --vary options form a grid.",
    )
    parser.add_argument(
        "--ablate.SETTING",
        nargs="+",
        metavar="VALUE",
        help="Values for one setting; each is combined only with the first variant of the grid.",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help=f"Train with seeds 0 to N-1 (default: {SEEDS}, or 1 if --vary gives the folds of a "
        "cross-validation).",
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help=study.HELP_JOBS)
    parser.add_argument("--name", default="compare", help=f"{study.HELP_NAME} (default: compare).")
    parser.add_argument("--rerun", choices=["stale"], help=study.HELP_RERUN)
    parser.add_argument(
        "--steps_to",
        type=float,
        metavar="VALUE",
        help="Report the number of steps until the validation metric reaches this value "
        "(default: the final value of the worst variant).",
    )
    return parser


def _check(
    options: argparse.Namespace,
    varied: Iterable[str],
    common: Sequence[str],
    repeated: Sequence[str],
) -> None:
    for name in ("seeds", "jobs"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1, for example --{name} 2.")
    for name in repeated:
        if f"--ablate.{name}" in varied:
            raise UserError(
                f"--ablate.{name} cannot be used: the values of {name} are repetitions, as seeds "
                f"are, and no variants.\nUse --vary.{name}, which trains every variant with each "
                "value."
            )
    names = [flag.partition(".")[2] for flag in varied]
    for name in ("seed_everything", "name", "ckpt_path", "trainer.default_root_dir"):
        if name in names:
            raise UserError(
                f"{name} cannot be varied.\n"
                "Use --seeds N to set the number of seeds, and --name NAME to name the study."
            )
    if options.norm and NORM in names:
        raise UserError(
            f"Norms are given twice, by --norm and by --vary.{NORM} or --ablate.{NORM}.\n"
            "Use only --norm NAME ..."
        )
    flags = {text.partition("=")[0] for text in common}
    if "--seed_everything" in flags:
        raise UserError(
            "--seed_everything cannot be used with compare, which trains with seeds 0 to N-1.\n"
            "Use --seeds N instead."
        )
    if f"--{NORM}" in flags and options.norm:
        raise UserError(f"--{NORM} cannot be used together with --norm.\nUse only --norm NAME ...")


def variants(
    grid: Mapping[str, Sequence[str]], ablated: Mapping[str, Sequence[str]]
) -> list[Variant]:
    """Return the variants of the grid, then those of the ablation.

    The baseline of a variant of the grid has the first norm, and the same other
    settings. If there is only one norm, the baseline is the first variant. A variant of
    the ablation is the first variant with one setting added or changed. Its baseline is
    the first variant.

    Raises:
        UserError: two variants have the same name.
    """
    points: list[Point] = [
        tuple(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
    ]
    first = points[0]
    norms = grid.get(NORM, [])
    pairs = [(point, _with_norm(point, norms[0]) if len(norms) > 1 else first) for point in points]
    for name, values in ablated.items():
        pairs += [((*first, (name, value)), first) for value in values]
    short = study.short_names({**grid, **ablated})
    found: dict[str, Variant] = {}
    for point, baseline in pairs:
        configs = tuple(value for name, value in point if name == "config")
        settings = tuple(pair for pair in point if pair[0] != "config")
        variant = Variant(_name(point, short), _name(baseline, short), configs, settings)
        # Some file systems are case-insensitive.
        if variant.folder.casefold() in found:
            raise UserError(
                f"Two variants have the name {variant.name!r}, so their runs would be stored in "
                "the same folder.\nRemove one of them, or rename its config file."
            )
        found[variant.folder.casefold()] = variant
    return list(found.values())


def baseline_label(compared: Sequence[Variant]) -> str:
    """Return the name of the baseline, or its norm if there are several baselines.

    Several baselines have the same norm, which is that of the first variant.
    """
    first = compared[0]
    if len({variant.baseline for variant in compared}) == 1:
        return first.baseline
    return dict(first.settings)[NORM]


def _with_norm(point: Point, norm: str) -> Point:
    return tuple((name, norm if name == NORM else value) for name, value in point)


def _name(point: Point, short: Mapping[str, str]) -> str:
    """Return the name of a variant, such as `lr=0.1 batch_size=64`."""
    words = []
    for name, value in point:
        if name == NORM:
            words.append(value)
        elif name == "config":
            words.append(Path(value).stem)
        else:
            words.append(f"{short[name]}={value}")
    return " ".join(words) or "base"
