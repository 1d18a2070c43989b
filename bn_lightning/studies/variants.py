"""The variants of a comparison, and the options of `compare` that define them."""

import argparse
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bn_lightning import terminal
from bn_lightning.errors import UserError
from bn_lightning.studies import study

DESCRIPTION = (
    "Train norms or settings with several seeds, and compare them in one table and a figure."
)
EPILOG = """\
Every setting of fit is also a setting of compare and holds for all runs: --config configs/X.yaml
--trainer.max_epochs 3. Unfinished runs are resumed, and finished ones are not repeated.
"""

NORM = "model.norm"

# A value of each varied setting: names and values.
Point = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Variant:
    """What is trained with each seed: settings, and the variant that it is compared with."""

    name: str
    reference: str
    configs: tuple[str, ...]
    settings: Point

    @property
    def folder(self) -> str:
        """The name of the folder of its runs."""
        return re.sub(r"[^\w.,=+-]+", ",", self.name)

    def arguments(self, common: Sequence[str]) -> list[str]:
        """Return the arguments of `fit`, from weak to strong.

        A config of the variant is weaker than the common arguments, and its settings are stronger.
        """
        configs = [text for config in self.configs for text in ("--config", config)]
        settings = [text for name, value in self.settings for text in (f"--{name}", value)]
        return [*configs, *common, *settings]


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[Variant], list[str]]:
    """Return the options of `compare`, the variants, and the settings that all runs share.

    Raises:
        UserError: a mistake in the options.
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
        raise UserError(f"{error}\nAll options: {parser.prog} --help") from error
    _check(options, varied, common)
    grid: dict[str, list[str]] = {NORM: options.norm} if options.norm else {}
    ablated: dict[str, list[str]] = {}
    for flag in varied:
        kind, _, name = flag.partition(".")
        (grid if kind == "--vary" else ablated)[name] = getattr(options, flag)
    return options, variants(grid, ablated), common


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        f"{terminal.program()} compare",
        usage="%(prog)s [--norm NAME ...] [--vary.SETTING VALUE ...] [--ablate.SETTING VALUE ...] "
        "[--seeds N] [settings of fit]",
        description=DESCRIPTION,
        epilog=EPILOG,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--norm", nargs="+", metavar="NAME", help="Norms: names or import paths.")
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
        help="Values for one setting; each is tried with the first point of the grid.",
    )
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="Seeds 0 to N-1 (default: 3)."
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help=study.HELP_JOBS)
    parser.add_argument("--name", default="compare", help=f"{study.HELP_NAME} (default: compare).")
    parser.add_argument(
        "--steps_to",
        type=float,
        metavar="VALUE",
        help="Count the steps until the validation metric that selects checkpoints has reached "
        "this value (default: one that every variant has reached at its end).",
    )
    return parser


def _check(options: argparse.Namespace, varied: Iterable[str], common: Sequence[str]) -> None:
    for name in ("seeds", "jobs"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}; it must be at least 1.")
    names = [flag.partition(".")[2] for flag in varied]
    for name in ("seed_everything", "name", "ckpt_path", "trainer.default_root_dir"):
        if name in names:
            raise UserError(
                f"{name} cannot be varied. For seeds use --seeds N, for another study --name NAME."
            )
    if options.norm and NORM in names:
        raise UserError("Norms are given twice: use --norm NAME ... alone.")
    typed = {text.partition("=")[0] for text in common}
    if "--seed_everything" in typed or (f"--{NORM}" in typed and options.norm):
        raise UserError(
            "What is compared is given by --norm NAME ... and --seeds N, not by --model.norm and "
            "--seed_everything."
        )


def variants(
    grid: Mapping[str, Sequence[str]], ablated: Mapping[str, Sequence[str]]
) -> list[Variant]:
    """Return a variant for each point of the grid, then for each ablated value.

    Each point is compared with the first norm with the same other settings, or with the first point
    where there is one norm only. An ablated value is tried with the first point, and compared with
    it.

    Raises:
        UserError: the runs of two variants would be stored in the same folder.
    """
    points: list[Point] = [
        tuple(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
    ]
    first = points[0]
    norms = grid.get(NORM, [])
    pairs = [(point, _with_norm(point, norms[0]) if len(norms) > 1 else first) for point in points]
    for name, values in ablated.items():
        pairs += [((*first, (name, value)), first) for value in values]
    short = study.short({**grid, **ablated})
    found: dict[str, Variant] = {}
    for point, reference in pairs:
        configs = tuple(value for name, value in point if name == "config")
        settings = tuple(pair for pair in point if pair[0] != "config")
        variant = Variant(_name(point, short), _name(reference, short), configs, settings)
        # Some file systems do not distinguish upper and lower case.
        if variant.folder.casefold() in found:
            raise UserError(
                f"Two variants are called {variant.name!r}; their runs would be stored in the "
                "same folder."
            )
        found[variant.folder.casefold()] = variant
    return list(found.values())


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
