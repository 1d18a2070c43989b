"""Copy the code cells of the English tour, and their outputs, to the Chinese one.

    python -m tests.support.tour

Run it after the English tour was executed. The two notebooks differ only in their Markdown
cells. They are matched by cell id, so the Chinese ones stay as they are.
"""

import copy

import nbformat

from tests.conftest import REPOSITORY

ENGLISH = REPOSITORY / ".github" / "tour.ipynb"
CHINESE = REPOSITORY / ".github" / "tour.zh-CN.ipynb"


def with_code_of(source, notebook):
    """Return a copy of `source` with the Markdown cells of `notebook`.

    Raises KeyError if `notebook` lacks a Markdown cell of `source`.
    """
    text = {cell.id: cell for cell in notebook.cells if cell.cell_type == "markdown"}
    copied = copy.deepcopy(source)
    copied.cells = [text[c.id] if c.cell_type == "markdown" else c for c in copied.cells]
    return copied


if __name__ == "__main__":
    english, chinese = (nbformat.read(path, as_version=4) for path in (ENGLISH, CHINESE))
    nbformat.write(with_code_of(english, chinese), CHINESE)
