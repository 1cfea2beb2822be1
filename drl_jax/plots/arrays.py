"""Draws vectors and signals: a corner plot, overlaid signals with power spectra, and panels."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, UInt8

from drl_jax.standardisation import IDENTITY, Standardisation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEATURES = 6  # largest number of features in a corner plot
SIGNALS = 10  # signals that are overlaid in a panel
CHANNELS = 3  # largest number of channels of signals that are shown
SIZE = 1.6  # width and height of a panel of a corner plot [inches]
WIDTH, HEIGHT = 3.6, 2.6  # of a panel of signals [inches]
BINS = 40  # of a histogram; fewer for fewer than 400 values
PERCENTILES = 0.1, 99.9  # limits of the axes, beyond which are a twentieth of their distance
COLOURS = {"data": "tab:blue", "samples": "tab:orange"}
PANELS = 4  # panels per row of `panels`

# How `panels` draws each kind of lines. Those without a colour lead from one colour to another.
STYLES: dict[str, dict[str, Any]] = {
    "known": {"color": "black", "marker": ".", "linewidth": 1.2},
    "observed": {"color": "black", "marker": ".", "linewidth": 0.8},
    "examples": {"color": "black", "marker": ".", "linewidth": 0.8},
    "completions": {"color": "tab:orange", "linewidth": 0.8, "alpha": 0.6},
    "samples": {"color": "tab:orange", "linewidth": 0.8, "alpha": 0.6},
    "mean": {"color": "tab:red", "linewidth": 1.4},
    "original": {"color": "tab:blue", "linewidth": 1.2, "linestyle": "--"},
    "frames": {"linewidth": 0.9},
    "map": {},  # a background, dark where it is high
}


def corner(
    samples: Float[np.ndarray, "n D"],
    data: Float[np.ndarray, "m D"] | None = None,
    names: Sequence[str] = (),
) -> UInt8[np.ndarray, "h w 3"]:
    """Returns a corner plot of the first features: histograms, and the points of each pair.

    A few points beyond the limits of the axes are not shown (`PERCENTILES`).

    Args:
      samples: vectors drawn from a model.
      data: vectors to show beside them, if any.
      names: names of all features; empty if there are none.
    """
    from matplotlib.figure import Figure  # takes half a second, and most tasks draw no figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    sets = _sets(samples, data)
    K = min(samples.shape[1], FEATURES)
    names = names or [f"x[:, {j}]" for j in range(K)]
    both = np.concatenate(list(sets.values()))
    limits = [_limits(both[:, j]) for j in range(K)]
    colours = np.repeat([COLOURS[name] for name in sets], [len(x) for x in sets.values()])
    order = np.random.default_rng(0).permutation(len(both))  # so that no set hides the other
    bins = min(BINS, 2 * math.isqrt(min(map(len, sets.values()))))
    figure = Figure(figsize=(SIZE * K + 0.4, SIZE * K + 0.4), layout="constrained")
    for j, i in itertools.combinations_with_replacement(range(K), 2):
        axes = figure.add_subplot(K, K, i * K + j + 1)
        if i == j:
            for name, x in sets.items():
                style = _histogram_style(name)
                axes.hist(x[:, j], bins, range=limits[j], density=True, **style)
        else:
            axes.scatter(both[order, j], both[order, i], s=4, linewidths=0, c=colours[order])
            axes.set_ylim(limits[i])
        axes.set_xlim(limits[j])
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(3))
        axes.tick_params(labelsize="x-small", labelbottom=i == K - 1, labelleft=i > j == 0)
        if i == j:
            axes.set_yticks([])
        if i == K - 1:
            axes.set_xlabel(names[j], fontsize="small")
        if i > j == 0:
            axes.set_ylabel(names[i], fontsize="small")
    figure.align_labels()
    patches = [Patch(color=COLOURS[name], label=f"{name} ({len(sets[name])})") for name in sets]
    figure.legend(
        handles=patches,
        loc="upper right" if K > 1 else "outside upper center",
        fontsize="small",
        frameon=False,
    )
    return _pixels(figure)


def signals(
    samples: Float[np.ndarray, "n L C"], data: Float[np.ndarray, "m L C"] | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """Returns panels of overlaid signals, and their mean power spectra, one row per channel.

    The spectrum is |sum_k x_k exp(-2 pi i f k)|² / L, averaged over all signals, for the
    frequencies f above 0 of the discrete Fourier transform.

    Args:
      samples: signals drawn from a model; the first `SIGNALS` are overlaid.
      data: signals to show beside them, if any.
    """
    from matplotlib.figure import Figure  # takes half a second, and most tasks draw no figure

    sets = _sets(samples, data)
    _, L, C = samples.shape
    rows, columns = min(C, CHANNELS), len(sets) + 1
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for channel, row in enumerate(grid):
        limits = _limits(np.concatenate([x[:SIGNALS, :, channel] for x in sets.values()]))
        for axes, (name, x) in zip(row, sets.items(), strict=False):
            lines = x[:SIGNALS, :, channel].T
            axes.plot(lines, color=COLOURS[name], linewidth=0.8, alpha=0.5)
            axes.set_ylim(limits)
            axes.set_title(f"{name}: {lines.shape[1]} of {len(x)}", fontsize="medium")
            spectrum = np.abs(np.fft.rfft(x[:, :, channel], axis=1)) ** 2 / L
            style = {"color": COLOURS[name], "linewidth": 1.2, "label": name}
            row[-1].plot(np.fft.rfftfreq(L)[1:], spectrum.mean(axis=0)[1:], **style)
        if C > 1:
            row[0].set_ylabel(f"channel {channel}")
        row[-1].set_yscale("log")
        row[-1].set_title("mean power spectrum", fontsize="medium")
        row[-1].legend(fontsize="x-small")
        row[-1].grid(alpha=0.3)
    for axes in grid[-1, :-1]:
        axes.set_xlabel("step")
    grid[-1, -1].set_xlabel("frequency [cycles per step]")
    return _pixels(figure)


def panels(
    parts: Mapping[str, Float[np.ndarray, "n _ *D"]],
    titles: Sequence[str] = (),
    standardisation: Standardisation = IDENTITY,
) -> UInt8[np.ndarray, "h w 3"]:
    """Returns one panel per example, with lines along time or, for vectors, along the features.

    Args:
      parts: lines of each kind of `STYLES`, several per example: vectors [n, k, D], or signals
        [n, k, L, C], of which the first channel is shown. Values that are not finite are
        left out. A map is the last one.
      titles: of the panels, if any.
      standardisation: of vectors, which are shown standardised: the scales of their features
        can differ.
    """
    from matplotlib import colormaps  # takes half a second, and most tasks draw no figure
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    first = next(iter(parts.values()))
    n, are_vectors = len(first), first.ndim == 3
    columns = min(n, PANELS)
    rows = -(-n // columns)
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for axes in grid[n:]:
        axes.set_axis_off()
    for i, axes in enumerate(grid[:n]):
        for name, lines in parts.items():
            values = lines[i] if are_vectors else lines[i, ..., 0]
            style = STYLES[name]
            if name == "map":
                extent = (-0.5, values.shape[1] - 0.5, *axes.get_ylim())  # behind the lines
                axes.imshow(
                    values, aspect="auto", extent=extent, cmap="Reds", vmin=0, vmax=1,
                    alpha=0.6, zorder=0,
                )  # fmt: skip
                continue
            values = standardisation.apply(values) if are_vectors else values
            for j, line in enumerate(values):
                colour = {} if "color" in style else {
                    "color": colormaps["viridis"](j / max(len(values) - 1, 1))
                }  # fmt: skip
                label = {"label": name} if i == j == 0 else {}
                axes.plot(line, **style, **colour, **label)
        if titles:
            axes.set_title(titles[i], fontsize="medium")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(labelbottom=i + columns >= n)
    figure.legend(loc="outside upper right", ncols=len(parts), fontsize="small")
    figure.supxlabel("feature" if are_vectors else "step", fontsize="medium")
    if are_vectors and not standardisation.is_identity:
        figure.supylabel("standard deviations from the mean", fontsize="medium")
    return _pixels(figure)


def _sets(
    samples: Float[np.ndarray, "n *D"], data: Float[np.ndarray, "m *D"] | None
) -> dict[str, np.ndarray]:
    """Returns what is drawn, by name: first the data, if any."""
    return {"samples": samples} if data is None else {"data": data, "samples": samples}


def _limits(x: Float[np.ndarray, "..."]) -> tuple[float, float]:
    """Returns the limits of an axis with these values (`PERCENTILES`)."""
    low, high = np.percentile(x, PERCENTILES)
    margin = (high - low) / 20 or 1.0
    return float(low - margin), float(high + margin)


def _histogram_style(name: str) -> dict[str, Any]:
    """Returns how the histogram of a set is drawn: data as an area, samples as a line."""
    if name == "data":
        return {"color": COLOURS[name], "histtype": "stepfilled", "alpha": 0.4}
    return {"color": COLOURS[name], "histtype": "step", "linewidth": 1.5}


def _pixels(figure: "Figure") -> UInt8[np.ndarray, "h w 3"]:
    """Returns the pixels of a figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
