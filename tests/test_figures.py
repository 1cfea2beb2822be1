"""Figures are complete, and the same file whenever they show the same numbers."""

import io

import numpy as np
import pytest
from etils import epath
from matplotlib.figure import Figure
from PIL import Image

from drl_jax.metrics import plane
from drl_jax.metrics.density import Course
from drl_jax.metrics.plane import Comparison
from drl_jax.plots import figures
from drl_jax.plots.figures import Histograms, Panel
from drl_jax.sampling.annealing import PASSES


def write_curves(path):
    curves = {"level 0": [1.0, 2.0, np.nan], "level 1": [3.0, 1.0, 2.0]}
    panels = [
        Panel(f"curve {i}", scale, curves, {"level 0": 1.5}, [0, 10, 1000])
        for i, scale in enumerate(("linear", "log", "symlog", "linear"))
    ]
    panels[1] = panels[1]._replace(x_label="seconds")
    figures.write_curves(path, panels)


def write_annealing(path):
    course = np.linspace(0, 1, 7)
    history = {name: Course(np.geomspace(1, 0.01, 7), *[course] * 3) for name in PASSES}
    figures.write_annealing(path, history, np.linspace(-1, 1, 50))


def write_levels(path):
    grid = plane.square_grid(half_width=2, side=41)
    log_q = -np.sum(grid.nodes**2, axis=-1)
    comparisons = {t: Comparison(log_q, log_q, 0.5, -1e-9, 0.0) for t in (0, 3, 5)}
    points = np.linspace(-1, 1, 20).reshape(10, 2)
    samples = {t: points * (t + 1) / 6 for t in (0, 2, 3, 5, 6)}
    figures.write_levels(path, comparisons, samples, grid)


def write_histograms(path):
    values = [np.linspace(0, 1, 100), np.linspace(0.5, 2, 30)]
    rows = [
        Histograms(title, ["level 0", "level 1"], [values, values], [["0.91"], ["0.50"]])
        for title in ("log-density F", "score norm |∇F|")
    ]
    figures.write_histograms(path, ["digits", "uniform"], rows, notes="numbers: AUROC")


def write_composition(path):
    grid = plane.square_grid(side=51)
    log_p = -np.sum(grid.nodes**2, axis=-1)
    samples = np.random.default_rng(0).normal(size=(1000, 2))
    figures.write_composition(path, {"moons": log_p, "moons - rings": -log_p}, samples, grid)


def write_rows(path):
    pictures = np.arange(2 * 40 * 80).reshape(2, 40, 80, 1).astype(np.uint8)
    rows = dict(zip(["class 5", "class 5 - class 10"], pictures, strict=True))
    figures.write_rows(path, rows)


TEXTS = {
    write_curves: {"curve 0", "curve 3", "level 0", "level 1", "steps", "seconds"},
    write_annealing: {
        "log Z of the intermediate distribution [nats]",
        "acceptance probability",
        "down, from white noise",
        "up, from data",
        "up, from samples",
        "tempered, from a wide Gaussian",
    },
    write_levels: {"true", "learned", "samples", "level 0", "level 3", "KL 0.0000"},
    write_composition: {"moons", "moons - rings", "1,000 samples"},
    write_rows: {"class 5", "class 5 - class 10"},
    write_histograms: {"digits", "uniform", "numbers: AUROC", "level 1", "0.91", "0.50"},
}


@pytest.fixture
def drawn(monkeypatch):
    """Texts of the figures that are written, one set per figure."""
    texts = []

    def savefig(figure, *args, save=Figure.savefig, **kwargs):
        save(figure, *args, **kwargs)
        found = figure.findobj(lambda artist: hasattr(artist, "get_text"))
        texts.append({artist.get_text() for artist in found})

    monkeypatch.setattr(Figure, "savefig", savefig)
    return texts


@pytest.mark.parametrize("write", TEXTS, ids=lambda write: write.__name__)
def test_a_figure_names_what_it_shows_and_is_reproducible(tmp_path, drawn, write):
    paths = [epath.Path(tmp_path / name) for name in ("first.png", "second.png")]
    for path in paths:
        write(path)
    first, second = (path.read_bytes() for path in paths)
    assert first == second
    image = Image.open(io.BytesIO(first))
    assert min(image.size) > 250
    assert np.ptp(np.asarray(image.convert("L"))) == 255  # not blank
    assert TEXTS[write] <= drawn[0]
