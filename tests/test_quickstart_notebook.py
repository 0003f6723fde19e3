"""The quick-start notebook runs from top to bottom with the smoke settings, in a real kernel."""

import pathlib

import nbclient
import nbformat

ROOT = pathlib.Path(__file__).resolve().parents[1]

PARAMETERS = """
import pathlib, runpy
CONFIG = pathlib.Path({config!r})
WORKDIR = pathlib.Path({workdir!r})
OVERRIDES = {{'env.cache_dir': {cache!r}}}
"""


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
