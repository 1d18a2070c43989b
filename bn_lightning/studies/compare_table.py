"""The tables of `compare`: columns, cells, and formatting as Markdown and CSV."""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bn_lightning.studies.statistics import Row


def _runs(row: Row, digits: int) -> str:
    runs = str(row.n) if row.n == row.runs else f"{row.n} of {row.runs}"
    return f"{runs}, {row.stale} stale" if row.stale else runs


def _mean(row: Row, digits: int) -> str:
    return _number(row.mean, digits) + ("" if row.sd is None else f" ± {_number(row.sd, digits)}")


def _interval(row: Row, digits: int) -> str:
    return "" if row.low is None else f"{_number(row.low, digits)} to {_number(row.high, digits)}"


def _compared(row: Row, digits: int) -> str:
    """Return a difference with its sign, or a ratio such as `1.50 times`, and its interval."""
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


# The header of each column, and a function that formats the cell of a row. Its second
# argument is the number of decimals of a mean.
COLUMNS: dict[str, Callable[[Row, int], str]] = {
    "{metric}": lambda row, digits: row.variant,
    "n": _runs,
    "mean ± sd": _mean,
    "95% interval": _interval,
    "vs {baseline} (95%)": _compared,
    "d": lambda row, digits: _number(row.effect_size, 1, "+"),
}


def header(metric: str, baseline: str) -> list[str]:
    """Return the header of the table of a metric."""
    return [column.format(metric=metric, baseline=baseline) for column in COLUMNS]


def cells(row: Row, digits: int) -> list[str]:
    """Return the cells of a row, one per column."""
    return [cell(row, digits) for cell in COLUMNS.values()]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    separator = ["---"] * len(header)
    return "".join(f"| {' | '.join(row)} |\n" for row in [header, separator, *rows])


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as CSV. The keys of the first row are the header. Numbers are not rounded."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
