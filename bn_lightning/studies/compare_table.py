"""The table of `compare`: its columns, as text, Markdown and CSV."""

import csv
import io
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from bn_lightning.studies.statistics import Row


def _runs(row: Row, digits: int) -> str:
    return str(row.n) if row.n == row.runs else f"{row.n} of {row.runs}"


def _mean(row: Row, digits: int) -> str:
    return _number(row.mean, digits) + ("" if row.sd is None else f" ± {_number(row.sd, digits)}")


def _interval(row: Row, digits: int) -> str:
    return "" if row.low is None else f"{_number(row.low, digits)} to {_number(row.high, digits)}"


def _compared(row: Row, digits: int) -> str:
    """Return a signed difference, or a ratio as `1.50 times`, with its interval."""
    if row.compared is None:
        return ""
    is_ratio = row.compared_by == "ratio"
    digits, sign = (2, "") if is_ratio else (digits, "+")
    text = _number(row.compared, digits, sign) + (" times" if is_ratio else "")
    if row.compared_low is None:
        return text
    low, high = _number(row.compared_low, digits, sign), _number(row.compared_high, digits, sign)
    return f"{text} ({low} to {high})"


def _number(value: float | None, digits: int, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}z,.{digits}f}"


# Each column: its head, and a row's cell as text, with so many decimals of a mean.
COLUMNS: dict[str, Callable[[Row, int], str]] = {
    "{metric}": lambda row, digits: row.variant,
    "n": _runs,
    "mean ± sd": _mean,
    "95% interval": _interval,
    "to {reference} (95%)": _compared,
    "d": lambda row, digits: _number(row.effect_size, 1, "+"),
}


def heads(metric: str, references: Collection[str]) -> list[str]:
    """Return the heads of `COLUMNS`.

    Where there are several references, they share their first word, the norm.
    """
    reference = min(references)
    if len(references) > 1:
        reference = reference.split()[0]
    return [head.format(metric=metric, reference=reference) for head in COLUMNS]


def cells(row: Row, digits: int) -> list[str]:
    """Return the cells of a row, one for each of `COLUMNS`."""
    return [cell(row, digits) for cell in COLUMNS.values()]


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
