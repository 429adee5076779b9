"""Every notebook runs from top to bottom, and prints what it is committed with.

``python -m tests.test_notebooks`` (``make notebooks``) writes the outputs of :data:`RECORDED` anew.
"""

import base64
from io import BytesIO
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
RECORDED = ("02_theory", "03_results")
"""Committed with their outputs; the others sample, and so print something else on another machine."""


def executed(path):
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": path.parent}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", record_timing=False, resources=resources).execute()
    return notebook


def printed(cell):
    return "".join(o["text"] for o in cell.get("outputs", []) if o.get("name") == "stdout")


def figures(cell):
    return [o["data"]["image/png"] for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path):
    notebook = executed(path)
    if path.stem == "01_quickstart":
        text = "".join(map(printed, notebook.cells))
        assert "privileged rollouts are correct" in text
        assert "rollout/reward" in text
    if path.stem in RECORDED:
        for was, now in zip(nbformat.read(path, as_version=4).cells, notebook.cells, strict=True):
            assert printed(was) == printed(now), "the committed output is another one: `make notebooks` writes it anew"
            assert len(figures(was)) == len(figures(now))


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem in RECORDED], ids=lambda p: p.stem)
def test_what_is_committed_is_small_and_tells_nothing_of_a_machine(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) < 400_000
    cells = nbformat.reads(text, as_version=4).cells
    assert sum(len(figures(cell)) for cell in cells) >= 3
    assert sum(map(len, map(printed, cells))) > 500
    assert not [path for path in ("/home/", "/root/", str(Path(__file__).parents[1])) if path in text]


def smaller(output):
    """The same image with 256 colours: half the bytes."""
    image, made = Image.open(BytesIO(base64.b64decode(output.data["image/png"]))), BytesIO()
    image.convert("RGB").quantize(256).save(made, "PNG", optimize=True)
    data = {"image/png": base64.b64encode(made.getvalue()).decode()}
    return nbformat.v4.new_output("display_data", data=data)


def write():
    for path in NOTEBOOKS:
        if path.stem in RECORDED:
            notebook = nbformat.read(path, as_version=4)
            for cell, found in zip(notebook.cells, executed(path).cells, strict=True):
                if cell.cell_type == "code":
                    text = printed(found)
                    images = [smaller(o) for o in found.outputs if "image/png" in o.get("data", {})]
                    stream = [nbformat.v4.new_output("stream", name="stdout", text=text)] if text else []
                    cell.outputs = stream + images
            nbformat.write(notebook, path)


if __name__ == "__main__":
    write()
