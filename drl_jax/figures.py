"""Curves, histograms and densities in the plane, as PNGs."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import ArrayLike, Float

from drl_jax.evaluation.density import History
from drl_jax.evaluation.plane import Grid, Known
from drl_jax.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Panels beside each other, and the size of one [inches].
COLUMNS = 3
WIDTH, HEIGHT = 4.0, 3.0

# Of the levels of an energy in the plane.
LEVELS = 6  # shown, at most
# Of the samples whose way is shown, which stand out from the densities' colours.
PATH_COLOURS = ("white", "#7fdbff", "#b6ff9e", "#ffe27f")
SIZE = 1.7  # of a panel [inches]
VIEW = 1.8  # half a panel's side, in units of the data
DEPTH = 10.0  # of the colours [nats]
INK = "#3b0f70"  # of the samples, from the densities' colours

# Of histograms, which stand in rows, another size [inches].
NARROW, LOW = 2.2, 2.2
BINS = 50
OUTLIERS = 0.1, 99.9  # percentiles beyond which nothing is drawn


class Panel(NamedTuple):
    """One pair of axes.

    Attributes:
      title: what is shown.
      scale: of the y axis, 'linear', 'log' or 'symlog'.
      curves: y by name; NaN where there is no point.
      marks: a height for some of the names: a dotted line in the curve's colour.
      x: of all curves [steps].
    """

    title: str
    scale: str
    curves: Mapping[str, Sequence[float]]
    marks: Mapping[str, float]
    x: Sequence[float]


def write_curves(path: epath.Path, panels: Sequence[Panel]) -> None:
    """Draws panels with logarithmic steps, 0 at their left edge, and writes them."""
    import matplotlib as mpl  # half a second, which most modes do not need
    from matplotlib.figure import Figure

    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(WIDTH * COLUMNS, HEIGHT * rows), layout="constrained")
    for number, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, COLUMNS, number)
        colours = mpl.colormaps["viridis"].resampled(len(panel.curves) + 1)
        for i, (name, y) in enumerate(panel.curves.items()):
            axes.plot(panel.x, y, ".-", color=colours(i), label=name)
            if name in panel.marks:
                axes.axhline(panel.marks[name], color=colours(i), linestyle=":")
        axes.set_xscale("symlog", linthresh=1)
        axes.set_yscale(panel.scale)
        axes.set_xlim(left=0)
        axes.set_title(panel.title, fontsize="medium")
        axes.set_xlabel("steps")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    _write(path, figure)


def write_annealing(path: epath.Path, history: History, log_density: ArrayLike) -> None:
    """Draws how annealing went, from white noise at the left to data at the right.

    Args:
      path: of the PNG.
      history: of both passes.
      log_density: of each example of the data [nats].
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH * 2, HEIGHT * 2), layout="constrained")
    panels = (
        ("log Z of the rung [nats]", history.log_Z),
        ("effective sample size / chains", history.effective_sample_size),
        ("acceptance", history.acceptance),
    )
    for number, (title, (down, up)) in enumerate(panels, 1):
        axes = figure.add_subplot(2, 2, number)
        axes.plot(history.sigma_bar, down, color="tab:blue", label="down, from white noise")
        axes.plot(
            history.sigma_bar, up, color="tab:orange", linestyle="--", label="up, from data"
        )
        axes.set_xscale("log")
        axes.invert_xaxis()
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("standard deviation of the noise")
        axes.grid(alpha=0.3)
        if number > 1:
            axes.set_ylim(0, 1.05)
        axes.legend(fontsize="x-small")
    axes = figure.add_subplot(2, 2, 4)
    axes.hist(log_density, bins="auto", color="tab:blue")
    axes.set_title("log-density of the data [nats]", fontsize="medium")
    axes.set_ylabel("examples")
    _write(path, figure)


def write_levels(
    path: epath.Path,
    known: Mapping[int, Known],
    on_the_way: Mapping[int, Float[np.ndarray, "n 2"]],
    grid: Grid,
) -> None:
    """Draws the levels of an energy in the plane, from noise on the left to data.

    Above each other: the true density, the learned one, samples; beside them, a few samples'
    ways down the ladder over the learned density of level 0.

    Args:
      path: of the PNG.
      known: what quadrature tells of a level, by level.
      on_the_way: the same samples at every level at which they were seen, from white noise
        down to level 0, the levels of `known` among them.
      grid: of `known`.
    """
    from matplotlib.figure import Figure  # half a second, which most modes do not need

    levels = sorted(known, reverse=True)
    columns = len(levels)
    figure = Figure(figsize=(SIZE * (columns + 3.1), SIZE * 3.25))
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    panels = figure.add_gridspec(3, columns + 3)
    middle = np.abs(grid.axis) <= VIEW
    view = np.ix_(middle, middle)
    for column, t in enumerate(levels):
        log_q, log_p = known[t].log_q[view], known[t].log_p[view]
        for row, (name, log_density) in enumerate((("true", log_q), ("learned", log_p))):
            axes = figure.add_subplot(panels[row, column])
            _show_density(axes, log_density, greatest=log_q.max())
            if not column:
                axes.set_ylabel(name)
            if not row:
                axes.set_title(f"level {t}", fontsize="medium")
        axes = figure.add_subplot(panels[2, column])
        x, y = on_the_way[t].T
        axes.plot(x, y, ".", color=INK, markersize=1.5, markeredgewidth=0, alpha=0.6)
        _bare(axes)
        axes.set_xlabel(f"KL {abs(known[t].kl):.4f}", fontsize="medium")
        if not column:
            axes.set_ylabel("samples")
    axes = figure.add_subplot(panels[:, columns:])
    _show_density(axes, known[0].log_p[view], greatest=known[0].log_q[view].max())
    way = np.stack([on_the_way[t] for t in sorted(on_the_way, reverse=True)])
    brightness = np.linspace(0.15, 1, len(way) - 1)  # the later, the brighter
    for track, colour in zip(way.swapaxes(0, 1), PATH_COLOURS, strict=False):
        for start, end, alpha in zip(track[:-1], track[1:], brightness, strict=True):
            x, y = np.stack([start, end], axis=1)
            axes.plot(x, y, color=colour, linewidth=1.2, alpha=alpha, solid_capstyle="round")
        axes.plot(*track[:1].T, "o", markersize=7, color="none", markeredgecolor=colour)
        axes.plot(*track[-1:].T, "o", markersize=8, color=colour, markeredgecolor="white")
    axes.set_title("from white noise (rings) to data (dots)", fontsize="medium")
    _write(path, figure)


def _show_density(axes: Any, log_density: Float[np.ndarray, "h w"], greatest: float) -> None:
    """Shows a log-density, first coordinate to the right, down to DEPTH below the greatest."""
    axes.imshow(
        log_density.T,
        origin="lower",
        extent=2 * (-VIEW, VIEW),
        vmin=greatest - DEPTH,
        vmax=greatest,
        cmap="magma",
        interpolation="bilinear",
    )
    _bare(axes)


def _bare(axes: Any) -> None:
    """Takes the ticks away and makes the plane square."""
    axes.set(xlim=(-VIEW, VIEW), ylim=(-VIEW, VIEW), aspect="equal", xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


class Histograms(NamedTuple):
    """A row of axes, each with histograms of several sets of numbers, one over the other.

    Attributes:
      title: what the numbers are.
      panels: title of each of the axes.
      values: the numbers of each set, in each panel.
      notes: a few characters for each set but the first, above each panel.
    """

    title: str
    panels: Sequence[str]
    values: Sequence[Sequence[Float[np.ndarray, "n"]]]
    notes: Sequence[Sequence[str]]


def write_histograms(
    path: epath.Path, sets: Sequence[str], rows: Sequence[Histograms], notes: str
) -> None:
    """Draws rows of histograms and writes them.

    Args:
      path: of the file.
      sets: their names, the same in all panels. The first is an area, the others are lines.
      rows: of equally many panels.
      notes: what the notes are; each has the colour of its set.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import EngFormatter, MaxNLocator

    columns, others = len(rows[0].panels), len(sets) - 1
    size = NARROW * max(columns, 3), LOW * len(rows) + 0.5
    figure = Figure(figsize=size, layout="constrained")
    colours = ["0.7", *mpl.colormaps["plasma"](np.linspace(0.1, 0.75, others))]
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for row, line in zip(rows, grid, strict=True):
        line[0].set_ylabel(row.title)
        for axes, title, values, marks in zip(line, *row[1:], strict=True):
            extent = tuple(np.percentile(np.concatenate(values), OUTLIERS))
            for i, x in enumerate(values):
                style = {"color": colours[i], "histtype": "step" if i else "stepfilled"}
                share = np.full(len(x), 1 / len(x))  # sets may differ in size
                axes.hist(x, BINS, range=extent, weights=share, linewidth=1.5, **style)
            for i, mark in enumerate(marks):
                style = {"color": colours[i + 1], "ha": "center", "fontsize": "small"}
                place = (i + 0.5) / others, 1.02  # of the axes' width and height
                axes.text(*place, mark, transform=axes.transAxes, **style)
            axes.set_title(title, pad=18)
            axes.set_yticks([])
            axes.spines[["left", "right", "top"]].set_visible(False)
            axes.xaxis.set_major_locator(MaxNLocator(3))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    patches = [Patch(color=c, label=name) for name, c in zip(sets, colours, strict=True)]
    patches.append(Patch(alpha=0, label=notes))
    figure.legend(handles=patches, loc="outside upper center", ncols=6, frameon=False)
    _write(path, figure)


def _write(path: epath.Path, figure: "Figure") -> None:
    """Writes a figure as PNG."""
    encoded = io.BytesIO()
    # Without the library's version in it, equal numbers are equal files.
    figure.savefig(encoded, format="png", metadata={"Software": None})
    write_whole(path, encoded.getvalue())
