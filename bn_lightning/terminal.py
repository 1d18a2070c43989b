"""What a person sees at the terminal while a run goes on and when it ends: a progress bar, and tables."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from rich.console import Console
from rich.table import Table
from torch import Tensor


class ProgressBar(TQDMProgressBar):
    """Lightning's, with the loss of the last logged step, and accuracy and images per second of the epoch so far.

    For a module that counts its train accuracy in a torchmetrics `train_acc`, as `Classifier` does.
    """

    BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"  # images/s stand for it/s

    def __init__(self) -> None:
        super().__init__(refresh_rate=10)  # each refresh takes some hundredths of a step

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description(f"Epoch {trainer.current_epoch + 1}")  # as the line at its end counts
        self._first: int | None = None  # batch of this epoch in this process; a resumed one is within it

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._first is None:
            self._first = batch_idx

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        metrics = {n: v for n, v in super().get_metrics(trainer, pl_module).items() if n not in ("v_num", "train_acc")}
        shown = {"loss": metrics.pop("train_loss", "")}
        counted = getattr(pl_module, "train_acc", None)
        if counted is not None and trainer.training:
            # By hand: compute() would ask the other processes, and they would not answer.
            shown["acc"] = f"{float(counted.tp.sum() / (counted.tp + counted.fn).sum().clamp(min=1)):.3f}"
        bar = self.train_progress_bar.format_dict
        size = getattr(trainer.datamodule, "batch_size", None)  # type: ignore[attr-defined]
        if size and bar["elapsed"]:
            shown["images/s"] = f"{(bar['n'] - (self._first or 0)) * size / bar['elapsed']:,.0f}"
        return shown | metrics


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], folds: int = 0) -> None:
    """Print a table to stdout, with a bold header where it is a terminal that has it and NO_COLOR is not set.

    Columns of numbers are aligned to the right. Where the terminal is too narrow, the column `folds` is folded.
    """
    rows = [list(map(str, row)) for row in rows]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        are_numbers = number and all(row[number][:1].isdigit() or row[number][:1] in ("-", "") for row in rows)
        shape: dict[str, Any] = {"overflow": "fold"} if number == folds else {"no_wrap": True}
        table.add_column(column, justify="right" if are_numbers else "left", **shape)
    for row in rows:
        table.add_row(*row)
    # What is no terminal has no width of its own, and paths are longer than 80 characters; they may have brackets.
    width = None if sys.stdout.isatty() else 500
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    with console.capture() as printed:
        console.print(table)
    print("\n".join(line.rstrip() for line in printed.get().splitlines()), flush=True)


def print_classes(confusion: Tensor, names: Sequence[str]) -> None:
    """The accuracy of each class, and what it is most often taken for: of counts (C, C), truth by rows."""
    rows = []
    for truth, counts in enumerate(confusion):
        total = int(counts.sum())
        others = counts.clone()
        others[truth] = 0
        wrong = int(others.argmax())
        taken_for = f"{names[wrong]} ({int(others[wrong]) / total:.1%})" if int(others[wrong]) else ""
        rows.append([names[truth], f"{int(counts[truth]) / total:.3f}" if total else "none", taken_for])
    print_table(("class", "test acc", "most often taken for"), rows)
