"""What `predict` answers: for each image its class, how sure the network is, and the runner-up."""

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
from bn_lightning.terminal import print_table

FORMATS = ("table", "csv", "json")
MOST_DRAWN = 400


@dataclass(frozen=True)
class Predictions:
    """The answers to a number of images.

    Args:
        about: for each image, what else is known of it: where it comes from, its class if known.
        probabilities: (N, C).
        names: of the classes.
    """

    about: Sequence[dict[str, Any]]
    probabilities: Tensor
    names: Sequence[str]

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """One flat object for each image."""
        two = self.probabilities.topk(2)
        answers = zip(self.about, two.values.tolist(), two.indices.tolist(), strict=True)
        return [
            {
                **about,
                "class": self.names[first],
                "probability": round(p, 4),
                "runner_up": self.names[second],
                "runner_up_probability": round(q, 4),
            }
            for about, (p, q), (first, second) in answers
        ]

    def print(self, form: str) -> None:
        """Print them as one of `FORMATS`."""
        if form == "json":
            print(json.dumps(self.rows, indent=2))
            return
        rows = [{name: _yes_or_no(value) for name, value in row.items()} for row in self.rows]
        if form == "csv":
            writer = csv.DictWriter(sys.stdout, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            return
        cells = [
            [f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows
        ]
        short = {"probability": "p", "runner_up": "runner-up", "runner_up_probability": "p"}
        print_table([short.get(name, name) for name in rows[0]], cells)

    def draw(self, path: Path, pictures: Tensor) -> None:
        """Write a sheet with the first `MOST_DRAWN` images and their answers.

        Args:
            pictures: of these images, uint8 (M, H, W) or (M, H, W, 3).

        Raises:
            RunFailed: it cannot be written.
        """
        rows = self.rows[:MOST_DRAWN]
        captions = [
            f"{next(iter(row.values()))}\n{row['class']} {row['probability']:.1%}\n"
            f"{row['runner_up']} {row['runner_up_probability']:.1%}"
            for row in rows
        ]
        try:
            drawing.grid(pictures, captions).save(path)
        except OSError as error:
            reason = error.strerror or str(error)
            raise RunFailed(f"The picture {str(path)!r} cannot be written: {reason}.") from error
        if len(rows) < len(self.about):
            print(
                f"{path} has the first {len(rows)} of {len(self.about):,} images", file=sys.stderr
            )


def _yes_or_no(value: Any) -> Any:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


def refuse_place(path: Path) -> None:
    """Refuse a place where `Predictions.draw` could not write, before the network is run.

    Raises:
        UserError: the folder does not exist, or the suffix is not that of a picture.
    """
    if not path.parent.is_dir():
        raise UserError(f"There is no folder {str(path.parent)!r} for --grid {path}")
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        suggested = path.with_suffix(".png")
        raise UserError(f"--grid {path} names no kind of picture: --grid {suggested}")
