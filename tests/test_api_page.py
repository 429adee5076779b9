"""The API page: every public name has its place, and one without a docstring is an error. Needs pdoc."""

import importlib.util
import re
import types
from pathlib import Path

import pytest

import hdpo

pytest.importorskip("pdoc")
SCRIPT = Path(__file__).parent.parent / "docs" / "build_api.py"


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("build_api", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_is_on_a_page(build, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hdpo, "__doc__", hdpo.__doc__)
    assert build.main(tmp_path) == 0
    assert f"{len(build.PAGES)} pages" in capsys.readouterr().out
    for page in build.PAGES:
        html = (tmp_path / f"{page.replace('.', '/')}.html").read_text(encoding="utf-8")
        missing = set(importlib.import_module(page).__all__) - set(re.findall(r'id="([\w.]+)"', html))
        assert not missing, page
    top = (tmp_path / "hdpo.html").read_text(encoding="utf-8")
    for page in build.PAGES[1:]:
        assert f'href="{page.replace(".", "/")}.html' in top, "there is a way to every page"
    losses = (tmp_path / "hdpo/losses.html").read_text(encoding="utf-8")
    assert "mass outside the teacher's top k adds" in losses, "an argument, as its docstring tells it"


def test_a_name_without_a_docstring_is_an_error(build, tmp_path, capsys, monkeypatch):
    path = tmp_path / "bare.py"
    path.write_text(
        '"""A module."""\n\n__all__ = ["Bare", "LIMIT", "told"]\n\nLIMIT = 3\n\n\n'
        "class Bare:\n    @property\n    def width(self):\n        return 1\n\n    def step(self):\n        pass\n\n"
        '    def told(self):\n        """Told."""\n\n    def _own(self):\n        pass\n\n\n'
        'def told():\n    """Told."""\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(build, "PAGES", ["bare"])
    assert isinstance(build.resolved("bare"), types.ModuleType)
    assert build.main(tmp_path / "out") == 1
    assert capsys.readouterr().err.split("\n")[1:-1] == ["bare.Bare", "bare.Bare.step", "bare.Bare.width", "bare.LIMIT"]
    assert not (tmp_path / "out").exists()
