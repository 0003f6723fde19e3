"""The quick-start notebook runs from top to bottom with the smoke settings, in a real kernel."""

import importlib.machinery
import importlib.util
import pathlib
import subprocess
import sys

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

PARAMETERS = """
import pathlib, runpy
CONFIG = pathlib.Path({config!r})
WORKDIR = pathlib.Path({workdir!r})
OVERRIDES = {{'env.cache_dir': {cache!r}}}
"""


@pytest.mark.parametrize("name", ["quickstart", "credit"])
@pytest.mark.parametrize("found, is_installed", [(None, False), ("a clone", False), ("the package", True)])
def test_a_clone_beside_the_notebook_is_not_yet_installed(name, found, is_installed, monkeypatch, tmp_path):
    """Python takes a folder of the name for a package without code."""
    (install,) = [
        "".join(cell.source)
        for cell in nbformat.read(ROOT / "colab" / f"{name}.ipynb", as_version=4).cells
        if "pip" in cell.source
    ]
    origin = {"a clone": None, "the package": "jaxagentrl/__init__.py"}
    spec = found and importlib.machinery.ModuleSpec("jaxagentrl", None, origin=origin[found])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(command[-1]))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jaxagentrl").mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path])
    exec(compile(install, name, "exec"), {})
    assert ran == ([] if is_installed else ["jaxagentrl"])
    assert (sys.path[0] == str(tmp_path / "jaxagentrl")) is not is_installed


@pytest.mark.slow
def test_the_quick_start_notebook_runs(tmp_path, smoke_games):
    notebook = nbformat.read(ROOT / "colab" / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = PARAMETERS.format(
                config=str(ROOT / "configs" / "textworld_smoke.py"),
                workdir=str(tmp_path / "run"),
                cache=str(smoke_games),
            )
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}
    )
    client.execute()
    outputs = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    kinds = {kind for output in outputs if "data" in output for kind in output.data}
    assert "image/png" in kinds
    tables = [o.data["text/html"] for o in outputs if "data" in o and "text/html" in o.data]
    assert any("observation" in table and "custom-w2-o3-q4" in table for table in tables)
