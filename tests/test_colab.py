"""Runs the Colab notebooks in kernels of their own."""

import nbclient
import nbformat
import pytest
from helpers import tiny

# First characters of the log evidence: -94, 33 and -87, with standard errors of 1.
BLURS = {0.5: "-", 1.0: "3", 2.0: "-"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_pictures", "words"),
    [
        ("colab_sampling", 6, ["100% of the digits"]),
        ("colab_restoration", 4, [f"blur {b}: log evidence {v}" for b, v in BLURS.items()]),
        ("colab_composition", 7, ["as 4: 100%, as 9: 0%", "largest difference 0.000"]),
        ("colab_your_arrays", 2, ["(4000, 64, 1)", "detected 9"]),
    ],
)
def test_the_notebook_runs_and_shows_its_pictures(
    name, num_pictures, words, monkeypatch, tmp_path
):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tiny.COMPILED))
    monkeypatch.setenv("PYTHONPATH", str(tiny.ROOT))
    notebook = nbformat.read(tiny.ROOT / "launch" / f"{name}.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)  # committed without outputs
    resources = {"metadata": {"path": str(tmp_path)}}  # where it writes files
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == num_pictures
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert [word for word in words if word not in printed] == []
