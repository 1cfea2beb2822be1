"""Pictures of vectors and signals show what they are given, and are reproducible."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from drl_jax.plots import arrays
from drl_jax.standardisation import Standardisation


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn."""
    drawn = []

    def draw(canvas, *args, original=FigureCanvasAgg.draw):
        drawn.append(canvas.figure)
        return original(canvas, *args)

    monkeypatch.setattr(FigureCanvasAgg, "draw", draw)
    return drawn


def texts(figure):
    found = figure.findobj(lambda artist: hasattr(artist, "get_text"))
    return {artist.get_text() for artist in found}


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape)


def test_a_corner_plot_has_the_pairs_of_the_first_six_features(figures):
    names = [f"name {j}" for j in range(8)]
    pixels = arrays.corner(normal(60, 8), normal(40, 8), names)
    np.testing.assert_array_equal(pixels, arrays.corner(normal(60, 8), normal(40, 8), names))
    assert len(figures[0].axes) == 6 * 7 // 2
    assert {*names[:6], "data (40)", "samples (60)"} <= texts(figures[0])
    assert "name 6" not in texts(figures[0])
    assert np.ptp(pixels) == 255  # not blank
    assert min(pixels.shape[:2]) > 300


def test_a_panel_has_the_features_of_its_row_and_column(figures):
    """Fails if the features of a panel, or samples and data, are exchanged."""
    x = np.arange(3) * 100 + normal(20, 3)
    arrays.corner(x, x + 10)
    panel = figures[0].axes[2]  # the pair of features 0 and 2
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("x[:, 0]", "x[:, 2]")
    (points,) = panel.collections
    shown = points.get_offsets()
    colours = points.get_facecolors()
    data = np.all(colours == colours[np.argmax(shown[:, 0])], axis=1)
    for expected, found in ((x, shown[~data]), (x + 10, shown[data])):
        np.testing.assert_allclose(np.sort(found[:, 0]), np.sort(expected[:, 0]))
        np.testing.assert_allclose(np.sort(found[:, 1]), np.sort(expected[:, 2]))


def test_numbers_are_shown_as_a_histogram(figures):
    arrays.corner(normal(500, 1))
    assert len(figures[0].axes) == 1
    assert texts(figures[0]) >= {"x[:, 0]", "samples (500)"}


def test_spectra_of_signals_have_their_peak_at_the_frequency_and_hold_all_power(figures):
    """Sines of amplitude sqrt(2) have the power 1: half of it, times 40 steps, is at each sign.

    Fails if samples and data are exchanged.
    """
    phase = np.linspace(0, 6, 30)[:, None, None]
    samples, data = (
        np.sqrt(2) * np.sin(2 * np.pi * f * np.arange(40)[:, None] + phase) for f in (0.1, 0.25)
    )
    arrays.signals(samples, data)
    *panels, spectra = figures[0].axes
    for line, frequency in zip(spectra.lines, (0.25, 0.1), strict=True):
        x, y = line.get_data()
        assert x[np.argmax(y)] == pytest.approx(frequency)
        assert y.max() == pytest.approx(20)
    for panel, shown in zip(panels, (data, samples), strict=True):
        lines = np.array([line.get_ydata() for line in panel.lines])
        np.testing.assert_array_equal(lines, shown[: arrays.SIGNALS, :, 0])


def test_each_of_the_first_channels_has_a_row(figures):
    pixels = arrays.signals(normal(4, 16, 5))
    assert len(figures[0].axes) == arrays.CHANNELS * 2
    assert {"channel 0", "channel 2", "samples: 4 of 4"} <= texts(figures[0])
    assert "channel 3" not in texts(figures[0])
    assert np.ptp(pixels) == 255


def test_a_panel_shows_all_of_the_lines_before_their_map(figures):
    """Fails if the map changes the limits, or lies elsewhere than at its features."""
    x = 100 + 50 * normal(5, 1, 7, 2)
    background = np.linspace(0, 1, 7)[:, None] * np.ones((5, 1, 1, 1))
    pixels = arrays.panels({"examples": x, "map": background}, [f"set {i}" for i in range(5)])
    assert (pixels.dtype, pixels.ndim, np.ptp(pixels)) == (np.uint8, 3, 255)
    assert {"set 0", "set 4", "examples", "step"} <= texts(figures[0])
    for axes, example in zip(figures[0].axes, x, strict=False):
        (line,), (image,) = axes.lines, axes.images
        np.testing.assert_array_equal(line.get_ydata(), example[0, :, 0])  # the first channel
        low, high = axes.get_ylim()
        assert low < example[..., 0].min() < example[..., 0].max() < high
        assert image.get_extent() == [-0.5, 6.5, low, high]


def test_vectors_are_shown_standardised_and_kinds_have_one_entry_each_in_the_legend(figures):
    mean, std = np.float32([1000, 1]), np.float32([100, 0.1])
    x = mean + std * normal(2, 3, 2)
    parts = {"known": np.where([True, False], x[:, :1], np.nan), "completions": x}
    arrays.panels(parts, standardisation=Standardisation(mean, std))
    lines = [line.get_ydata() for line in figures[0].axes[1].lines]
    np.testing.assert_allclose(lines[1:], normal(2, 3, 2)[1], rtol=1e-4)
    np.testing.assert_allclose(lines[0], [normal(2, 3, 2)[1, 0, 0], np.nan], rtol=1e-4)
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["known", "completions"]
    assert {"feature", "standard deviations from the mean"} <= texts(figures[0])
