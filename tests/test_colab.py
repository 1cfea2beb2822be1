"""The Colab notebook, from top to bottom in a kernel of its own."""

import nbclient
import nbformat
import pytest
from helpers import tiny


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom_and_shows_its_pictures(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tiny.COMPILED))
    monkeypatch.setenv("PYTHONPATH", str(tiny.ROOT))
    notebook = nbformat.read(tiny.ROOT / "launch" / "colab_sampling.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)  # small, and no stale ones
    nbclient.NotebookClient(notebook, timeout=600).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 6
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "the more probable in 100% of the pairs" in printed
