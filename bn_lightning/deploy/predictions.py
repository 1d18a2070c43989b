"""Predicted classes with probabilities, as a table, CSV, JSON or an image sheet."""

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from bn_lightning.errors import RunFailed, UserError
from bn_lightning.monitoring import drawing
from bn_lightning.terminal import print_table, printable

FORMATS = ("table", "csv", "json")
MAX_DRAWN = 400
UNCALIBRATED = "Probabilities are uncalibrated"


@dataclass(frozen=True)
class Predictions:
    """Predictions for a sequence of images.

    Args:
        about: the first columns for each image, such as its file, or its index and its
            true class.
        probabilities: (N, C).
        names: names of the C classes.
    """

    about: Sequence[dict[str, Any]]
    probabilities: Tensor
    names: Sequence[str]

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """One flat dictionary for each image."""
        top = self.probabilities.topk(2)
        best_two = zip(self.about, top.values.tolist(), top.indices.tolist(), strict=True)
        return [
            {
                **about,
                "class": self.names[first],
                "probability": round(p, 4),
                "runner_up": self.names[second],
                "runner_up_probability": round(q, 4),
            }
            for about, (p, q), (first, second) in best_two
        ]

    def print(self, form: str) -> None:
        """Print the predictions in one of `FORMATS`.

        The table says in its column titles that probabilities are uncalibrated. The keys
        of the other formats are fixed, so a line on stderr says it, at a terminal only.
        """
        if form == "table":
            self._print_table()
            return
        if form == "json":
            print(json.dumps(self.rows, indent=2))
        else:
            rows = self._readable_rows()
            if sys.stdout.isatty():
                # A file has the names unchanged, but they must not control a terminal.
                rows = [{name: printable(str(v)) for name, v in row.items()} for row in rows]
            writer = csv.DictWriter(sys.stdout, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        if sys.stderr.isatty():
            sys.stdout.flush()
            meaning = "p = 0.9 does not mean that 90% of such predictions are right."
            print(f"{UNCALIBRATED}: {meaning}", file=sys.stderr)

    def _print_table(self) -> None:
        rows = self._readable_rows()
        cells = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in r.values()] for r in rows]
        p = "uncalibrated p"
        titles = {"probability": p, "runner_up": "runner-up", "runner_up_probability": p}
        print_table([titles.get(name, name) for name in rows[0]], cells)

    def _readable_rows(self) -> list[dict[str, Any]]:
        return [{name: _yes_or_no(value) for name, value in row.items()} for row in self.rows]

    def draw(self, path: Path, images: Tensor) -> None:
        """Write a sheet of the first `MAX_DRAWN` images with their predictions.

        Args:
            images: uint8 (M, H, W) or (M, H, W, 3).

        Raises:
            RunFailed: the file cannot be written.
        """
        rows = self.rows[:MAX_DRAWN]
        captions = [
            f"{next(iter(row.values()))}\n{row['class']} {row['probability']:.1%}\n"
            f"{row['runner_up']} {row['runner_up_probability']:.1%}"
            for row in rows
        ]
        sheet = drawing.titled(drawing.grid(images, captions), UNCALIBRATED)
        try:
            sheet.save(path)
        except OSError as error:
            reason = error.strerror or str(error)
            raise RunFailed(f"Cannot write the image sheet {str(path)!r}: {reason}.") from error
        if len(rows) < len(self.about):
            total = len(self.about)
            print(f"{path} shows the first {len(rows)} of {total:,} images", file=sys.stderr)


def _yes_or_no(value: Any) -> Any:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


def refuse_invalid_sheet_path(path: Path) -> None:
    """Raise UserError if `Predictions.draw` could not write to a path.

    The folder has to exist, and the suffix has to be one of an image format.
    """
    if not path.parent.is_dir():
        raise UserError(
            f"There is no folder {str(path.parent)!r} for --grid {path}. Create it first."
        )
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        suggested = path.with_suffix(".png")
        raise UserError(
            f"Unsupported image format {path.suffix!r} for --grid: use, for example, "
            f"--grid {suggested}"
        )
