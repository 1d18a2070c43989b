"""The two tours: limits of cells, numbers and links of the text, stored outputs, and a run."""

import os
import re

import nbclient
import nbformat
import pytest

from tests.conftest import REPOSITORY
from tests.support.tour import CHINESE, ENGLISH, with_code_of

# A decimal number or a percentage, such as 0.372, -1.5 or 96%. Chinese characters are no
# letters here: they may stand beside a number without a space.
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+%?|%)(?![\w.]*\d)", flags=re.ASCII)
COUNT = re.compile(r"(?<![\w.])\d{3,}(?!\w|\.\d)", flags=re.ASCII)
# The last three are the Chinese full stop, question mark and exclamation mark.
SENTENCE_END = re.compile(r"(?<!et al)[.?!](?=[\s)*]|$)|[\u3002\uff1f\uff01]")
LINK = re.compile(r"\[[^]]*\]\(([^)]*)\)")
# Formulas, code, links and headings contain no results.
NOT_PROSE = re.compile(
    r"\$\$.*?\$\$|\$[^$]*\$|```.*?```|`[^`]*`|^#.*?$|" + LINK.pattern, flags=re.S | re.M
)
FORMULA = re.compile(r"\$\$.*?\$\$", flags=re.S)
# Paths with two folders, times and speeds, dates, addresses of objects.
CHANGES = re.compile(r"(?:/[\w.-]+){2,}|\d\s?m?s\b|seconds|/s\b|\d{4}-\d\d|0x[0-9a-f]{6}")

# Settings of a run on the packaged sample that takes a minute. Its numbers are not compared.
SHORT = {
    "FashionMNIST(": 'FashionMNIST("sample", ',
    "EPOCHS = 4": "EPOCHS = 2",
    "max_steps=1500": "max_steps=30",
}


@pytest.fixture(params=[ENGLISH, CHINESE], ids=["english", "chinese"])
def tour(request):
    return read(request.param)


def read(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def prose(cell):
    """Return the text of a Markdown cell without formulas, code, links and headings."""
    return NOT_PROSE.sub("", cell.source)


def printed(cell):
    """Return what a code cell has printed."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def figures(cell):
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def sections(notebook):
    """Return the cells of each section, by its heading."""
    found = {}
    for cell in notebook.cells:
        heading = re.match(r"##? (.*)", cell.source)
        if cell.cell_type == "markdown" and heading:
            name = heading[1]
        found.setdefault(name, []).append(cell)
    return found


def test_the_cells_are_short(tour):
    cells = tour.cells
    assert len(cells) <= 40
    for cell in cells:
        if cell.cell_type == "code":
            assert len(cell.source.splitlines()) <= 30, cell.id
        else:
            ends = SENTENCE_END.findall(prose(cell))
            assert len(ends) <= 10, cell.id


def test_each_code_cell_was_run_in_order(tour):
    cells = [cell for cell in tour.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]


def test_each_number_of_the_text_is_in_an_output_of_its_section(tour):
    checked = 0
    for name, cells in sections(tour).items():
        outputs = "\n".join(printed(cell) for cell in cells if cell.cell_type == "code")
        results = set(NUMBER.findall(outputs))
        for cell in cells:
            if cell.cell_type == "markdown":
                claimed = NUMBER.findall(prose(cell))
                assert set(claimed) <= results, (name, cell.id, set(claimed) - results)
                checked += len(claimed)
    assert checked > 30


def test_each_count_of_the_text_is_in_the_code_or_an_output(tour):
    cells = tour.cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    known = "\n".join(cell.source + printed(cell) for cell in code)
    # 1,500 and 1_500 are the same count.
    known = set(re.findall(r"\d+", re.sub(r"(?<=\d)[_,](?=\d)", "", known)))
    for cell in cells:
        if cell.cell_type == "markdown":
            text = re.sub(r"(?<=\d),(?=\d)", "", prose(cell))
            claimed = set(COUNT.findall(text))
            assert claimed <= known, (cell.id, claimed - known)


def test_the_outputs_contain_nothing_that_changes_from_run_to_run(tour):
    assert tour.metadata.keys() <= {"kernelspec", "language_info"}
    assert tour.metadata.get("language_info", {}).keys() <= {"name"}
    for cell in tour.cells:
        assert not cell.metadata, cell.id
        assert re.fullmatch(r"[a-z][a-z-]*", cell.id)
        for output in cell.get("outputs", ()):
            assert output.get("name") != "stderr", cell.id
            assert output.output_type in ("stream", "display_data"), cell.id
        # Streams that are split depend on the speed of the run.
        if cell.cell_type == "code":
            assert sum(output.output_type == "stream" for output in cell.outputs) <= 1, cell.id
            found = CHANGES.search(printed(cell))
            assert not found, (cell.id, found)


def test_the_links_resolve(tour):
    for cell in tour.cells:
        for link in LINK.findall(cell.source):
            assert link.startswith("https://") or (ENGLISH.parent / link).exists(), link


def test_only_the_text_differs_between_the_languages():
    english, chinese = read(ENGLISH), read(CHINESE)
    assert [cell.id for cell in chinese.cells] == [cell.id for cell in english.cells]
    # If this fails, run: python -m tests.support.tour
    assert with_code_of(english, chinese) == chinese
    for cell, translated in zip(english.cells, chinese.cells, strict=True):
        if cell.cell_type == "markdown":
            assert FORMULA.findall(cell.source) == FORMULA.findall(translated.source), cell.id
            assert re.search("[\u4e00-\u9fff]", translated.source), cell.id
            numbers = set(NUMBER.findall(prose(cell)))
            assert numbers == set(NUMBER.findall(prose(translated))), cell.id


@pytest.mark.slow
def test_the_tour_runs_on_the_sample(tmp_path, monkeypatch):
    # The kernel runs in another folder.
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY), prepend=os.pathsep)
    stored, notebook = read(ENGLISH), read(ENGLISH)
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert all(setting in code for setting in SHORT)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            for setting, short in SHORT.items():
                cell.source = cell.source.replace(setting, short)
    client = nbclient.NotebookClient(
        notebook, timeout=250, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    assert not [*tmp_path.iterdir()]

    outputs = {cell.id: printed(cell) for cell in notebook.cells if cell.cell_type == "code"}
    for cell, before in zip(notebook.cells, stored.cells, strict=True):
        if cell.cell_type == "code":
            assert figures(cell) == figures(before), cell.id
            assert not [o for o in cell.outputs if o.get("name") == "stderr"], cell.id
    for name in ("function", "gradient"):
        differences = re.findall(r"difference from \w+:? (\S+)", outputs[name])
        assert differences and all(float(value) < 1e-12 for value in differences)
    for name in ("mode", "buffers", "momentum", "printed"):
        assert "FAIL" in outputs[name]
    assert ", 0 FAIL" in outputs["own"]
