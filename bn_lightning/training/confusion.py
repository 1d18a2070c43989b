"""The classes of a confusion matrix that a report shows, and their names."""

from torch import Tensor

# Reports of more classes show only those with the lowest accuracy.
MAX_CLASSES = 20
MAX_CHARACTERS = 24  # of the name of a class in a report


def reported_classes(confusion: Tensor) -> list[int]:
    """Return the labels of the classes to show.

    All classes are shown if there are at most `MAX_CLASSES`. Otherwise, that number of
    classes with test samples is shown: those with the lowest accuracy, the lowest first,
    and among equal ones, those with the most mistakes.

    Args:
        confusion: counts (C, C), a row per true class and a column per predicted class.
    """
    labels = range(len(confusion))
    if len(labels) <= MAX_CLASSES:
        return [*labels]
    totals, right = confusion.sum(1).tolist(), confusion.diag().tolist()
    tested = [label for label in labels if totals[label]]
    tested.sort(key=lambda label: (right[label] / totals[label], -totals[label]))
    return tested[:MAX_CLASSES]


def describe_selection(confusion: Tensor) -> str:
    """Return which classes are shown; an empty string if all are."""
    shown = len(reported_classes(confusion))
    if shown == len(confusion):
        return ""
    untested = int((confusion.sum(1) == 0).sum())
    return f"The {shown} of {len(confusion)} classes with the lowest test accuracy" + (
        f"; {untested} have no test samples" if untested else ""
    )


def short_name(name: str) -> str:
    """Return the name of a class on one line, shortened in the middle if it is long."""
    name = " ".join(name.split())
    half = (MAX_CHARACTERS - 3) // 2
    return name if len(name) <= MAX_CHARACTERS else f"{name[:half]}...{name[-half:]}"
