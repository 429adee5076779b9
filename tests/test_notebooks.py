"""Every notebook runs from top to bottom, and prints what it is committed with.

``python -m tests.test_notebooks`` (``make notebooks``) writes the outputs anew; words after it name some.
"""

import ast
import base64
import re
import sys
from io import BytesIO
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
SAMPLED = "01_quickstart"
"""Samples from a policy, and so may print other numbers and texts on another machine."""


def executed(path):
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": path.parent}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", record_timing=False, resources=resources).execute()
    return notebook


def printed(cell):
    return "".join(o["text"] for o in cell.get("outputs", []) if o.get("name") == "stdout")


def figures(cell):
    return [o["data"]["image/png"] for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]


# The quickstart runs with the fast tests.
@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=[] if p.stem[:2] == "01" else pytest.mark.slow) for p in NOTEBOOKS]
)
def test_notebook_runs(path):
    notebook = executed(path)
    for was, now in zip(nbformat.read(path, as_version=4).cells, notebook.cells, strict=True):
        said = (printed(was), printed(now))
        if path.stem == SAMPLED:
            said = tuple(set(re.findall(r"[a-z/]{4,}", text.partition("plain:")[0])) for text in said)
        assert said[0] == said[1], "the committed output is another one: `make notebooks` writes it anew"
        assert len(figures(was)) == len(figures(now))


def test_the_quickstart_trains_on_the_public_names_alone():
    """Of this project it imports ``hdpo`` itself; its last cell prints what the Trainer measured, and plots it."""
    cells = nbformat.read(NOTEBOOKS[0], as_version=4).cells
    *_, last = (cell for cell in cells if cell.cell_type == "code")
    nodes = [node for cell in cells if cell.cell_type == "code" for node in ast.walk(ast.parse(cell.source))]
    homes = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    homes += [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
    assert {home for home in homes if home.startswith("hdpo")} == {"hdpo"}
    assert "trainer.fit(module, data)" in last.source
    rows = [line.split() for line in printed(last).splitlines()[1:]]
    assert [int(row[0]) for row in rows] == list(range(12))
    assert all(0 <= float(value) <= 1 for row in rows for value in row[1:3])
    assert any(row[4] != "-" for row in rows), "some step distilled"
    assert len(figures(last)) == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_what_is_committed_is_small_and_tells_nothing_of_a_machine(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) < 650_000
    cells = nbformat.reads(text, as_version=4).cells
    assert sum(len(figures(cell)) for cell in cells) >= (1 if path.stem == SAMPLED else 3)
    assert sum(map(len, map(printed, cells))) > 500
    assert not [path for path in ("/home/", "/root/", str(Path(__file__).parents[1])) if path in text]


def smaller(output):
    """The same image with 256 colours: half the bytes."""
    image, made = Image.open(BytesIO(base64.b64decode(output.data["image/png"]))), BytesIO()
    image.convert("RGB").quantize(256).save(made, "PNG", optimize=True)
    data = {"image/png": base64.b64encode(made.getvalue()).decode()}
    return nbformat.v4.new_output("display_data", data=data)


def write(words):
    for path in NOTEBOOKS:
        if not words or any(word in path.stem for word in words):
            notebook = nbformat.read(path, as_version=4)
            for cell, found in zip(notebook.cells, executed(path).cells, strict=True):
                if cell.cell_type == "code":
                    text = printed(found)
                    images = [smaller(o) for o in found.outputs if "image/png" in o.get("data", {})]
                    stream = [nbformat.v4.new_output("stream", name="stdout", text=text)] if text else []
                    cell.outputs = stream + images
            nbformat.write(notebook, path)


if __name__ == "__main__":
    write(sys.argv[1:])
