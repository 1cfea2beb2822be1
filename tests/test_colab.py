"""Runs the Colab notebook in a kernel of its own."""

import nbclient
import nbformat
import pytest
from helpers import tiny


@pytest.mark.slow
def test_the_notebook_runs_and_shows_its_pictures(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tiny.COMPILED))
    monkeypatch.setenv("PYTHONPATH", str(tiny.ROOT))
    notebook = nbformat.read(tiny.ROOT / "launch" / "colab_sampling.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)  # committed without outputs
    nbclient.NotebookClient(notebook, timeout=600).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 6
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "100% of the digits" in printed
