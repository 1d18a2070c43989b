"""The table of a comparison: its cells as text, Markdown and CSV."""

import csv
import io
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from bn_lightning.studies.statistics import Row


def columns(metric: str, references: Collection[str]) -> list[str]:
    """Return the column names for `cells`.

    Where there are several references, they share their first word, the norm.
    """
    reference = min(references)
    if len(references) > 1:
        reference = reference.split()[0]
    return [metric, "n", "mean ± sd", "95% interval", f"to {reference} (95%)", "d"]


def cells(row: Row, digits: int) -> list[str]:
    """Return a row as text, under `columns`; means with so many decimals."""
    compared = ""
    if row.compared is not None:
        compared = _compared(row, row.compared, digits)
    return [
        row.variant,
        str(row.n) if row.n == row.runs else f"{row.n} of {row.runs}",
        _number(row.mean, digits) + ("" if row.sd is None else f" ± {_number(row.sd, digits)}"),
        "" if row.low is None else f"{_number(row.low, digits)} to {_number(row.high, digits)}",
        compared,
        _number(row.effect_size, 1, "+"),
    ]


def _compared(row: Row, value: float, digits: int) -> str:
    """Return a signed difference, or a ratio as `1.50 times`, with its interval."""
    is_ratio = row.compared_by == "ratio"
    digits, sign = (2, "") if is_ratio else (digits, "+")
    text = _number(value, digits, sign) + (" times" if is_ratio else "")
    if row.compared_low is None:
        return text
    low, high = _number(row.compared_low, digits, sign), _number(row.compared_high, digits, sign)
    return f"{text} ({low} to {high})"


def _number(value: float | None, digits: int, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}z,.{digits}f}"


def markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    head = [heads, ["---"] * len(heads)]
    return "".join(f"| {' | '.join(line)} |\n" for line in [*head, *lines])


def as_csv(lines: Sequence[dict[str, Any]]) -> str:
    """Return CSV with the keys of the first line as its header. Numbers are not rounded."""
    text = io.StringIO()
    writer = csv.DictWriter(text, lines[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
