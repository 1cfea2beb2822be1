"""Draws figures as PNG files: curves, histograms, and densities in the plane."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import ArrayLike, Float, UInt8

from drl_jax.metrics.density import Course
from drl_jax.metrics.plane import Comparison, Grid
from drl_jax.storage.atomic import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Curves.
COLUMNS = 3  # panels per row
WIDTH, HEIGHT = 4.0, 3.0  # of a panel [inches]

# Label and style of each pass of annealing.
ANNEALING_CURVES: dict[str, tuple[str, dict[str, Any]]] = {
    "levels": ("down, from white noise", {"color": "tab:blue"}),
    "tempered": ("tempered, from a wide Gaussian", {"color": "tab:green", "linestyle": "-."}),
    "from_data": ("up, from data", {"color": "tab:orange", "linestyle": "--"}),
    "from_model": ("up, from samples", {"color": "tab:red", "linestyle": ":"}),
}

# Densities in the plane, level by level.
LEVELS = 6  # maximum number of levels shown
PATH_COLOURS = ("white", "#7fdbff", "#b6ff9e", "#ffe27f")  # one per path, none is in `magma`
SIZE = 1.7  # width and height of a panel [inches]
HALF_WIDTH = 1.8  # half the side of a panel, in units of the data
DEPTH = 10.0  # range of the colour scale [nats]
SAMPLE_COLOUR = "#3b0f70"  # a colour of `magma`

# Histograms.
HISTOGRAM_WIDTH, HISTOGRAM_HEIGHT = 2.2, 2.2  # of a panel [inches]
BINS = 50
PERCENTILES = 0.1, 99.9  # of all values: limits of the horizontal axis


class Panel(NamedTuple):
    """Curves that share a pair of axes.

    Attributes:
      title: title of the panel.
      scale: scale of the y axis: 'linear', 'log' or 'symlog'.
      curves: for the name of each curve, its y values; NaN where there is none. The line
        connects the others.
      marks: for the names of some curves, the y value of a dotted line in the same colour.
      x: x values of all curves.
      x_label: what these are.
    """

    title: str
    scale: str
    curves: Mapping[str, Sequence[float]]
    marks: Mapping[str, float]
    x: Sequence[float]
    x_label: str = "steps"


def write_curves(path: epath.Path, panels: Sequence[Panel]) -> None:
    """Writes a figure of panels of curves, with a logarithmic x axis.

    The axis includes 0 if the smallest x value is 1 or less. If all panels have the same
    curves, there is one legend, below them.

    Args:
      path: path of the PNG file.
      panels: panels, drawn row by row.

    Raises:
      UserError: if the file cannot be written.
    """
    import matplotlib as mpl  # takes half a second, and most tasks draw no figure
    from matplotlib.figure import Figure

    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(WIDTH * COLUMNS, HEIGHT * rows), layout="constrained")
    names = {tuple(panel.curves) for panel in panels}
    for number, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, COLUMNS, number)
        colours = mpl.colormaps["viridis"].resampled(len(panel.curves) + 1)
        for i, (name, y) in enumerate(panel.curves.items()):
            found = np.isfinite(y)
            points = np.asarray(panel.x)[found], np.asarray(y)[found]
            axes.plot(*points, ".-", color=colours(i), label=name)
            if name in panel.marks:
                axes.axhline(panel.marks[name], color=colours(i), linestyle=":")
        axes.set_xscale("symlog", linthresh=1)  # logarithmic from 1 on
        axes.set_yscale(panel.scale)
        if min(panel.x, default=0) <= 1:
            axes.set_xlim(left=0)
        axes.set_title(panel.title, fontsize="medium")
        axes.set_xlabel(panel.x_label)
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend(fontsize="x-small")
    if len(names) == 1:
        lines = axes.get_legend_handles_labels()
        figure.legend(*lines, loc="outside lower center", ncols=COLUMNS, fontsize="x-small")
    _write(path, figure)


def write_annealing(
    path: epath.Path, history: Mapping[str, Course], log_density: ArrayLike
) -> None:
    """Writes a figure of an annealing run, from a Gaussian on the left to data on the right.

    Args:
      path: path of the PNG file.
      history: course of each pass, by name (`density.history`).
      log_density: log-density of each of n examples of the data, [n], in nats.

    Raises:
      UserError: if the file cannot be written.
    """
    from matplotlib.figure import Figure  # takes half a second, and most tasks draw no figure

    figure = Figure(figsize=(WIDTH * 2, HEIGHT * 2), layout="constrained")
    panels = {
        "log Z of the intermediate distribution [nats]": "log_Z",
        "effective sample size / number of chains": "effective_sample_size",
        "acceptance probability": "acceptance",
    }
    for number, (title, field) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(2, 2, number)
        for name, (label, style) in ANNEALING_CURVES.items():
            axes.plot(history[name].width, getattr(history[name], field), label=label, **style)
        axes.set_xscale("log")
        axes.invert_xaxis()
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("standard deviation of the noise; tempered: width")
        axes.grid(alpha=0.3)
        if number > 1:
            axes.set_ylim(0, 1.05)
        axes.legend(fontsize="x-small")
    axes = figure.add_subplot(2, 2, 4)
    axes.hist(log_density, bins="auto", color="tab:blue")
    axes.set_title("log-density of the data [nats]", fontsize="medium")
    axes.set_ylabel("number of examples")
    _write(path, figure)


def write_levels(
    path: epath.Path,
    comparisons: Mapping[int, Comparison],
    samples: Mapping[int, Float[np.ndarray, "n 2"]],
    grid: Grid,
) -> None:
    """Writes a figure of the levels of an energy in the plane, from noise on the left to data.

    The rows show the true density, the learned density and samples of each level. On the right,
    the paths of a few samples through the levels are drawn over the learned density of level 0.

    Args:
      path: path of the PNG file.
      comparisons: learned and true densities, by level; level 0 must be included.
      samples: positions of the same samples, by level: of white noise (level T), of all levels
        of `comparisons`, and of any further levels that the paths pass through.
      grid: grid of the densities.

    Raises:
      UserError: if the file cannot be written.
    """
    from matplotlib.figure import Figure  # takes half a second, and most tasks draw no figure

    levels = sorted(comparisons, reverse=True)
    columns = len(levels)
    figure = Figure(figsize=(SIZE * (columns + 3.1), SIZE * 3.25))
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    panels = figure.add_gridspec(3, columns + 3)
    visible = np.abs(grid.axis) <= HALF_WIDTH
    view = np.ix_(visible, visible)
    for column, t in enumerate(levels):
        log_q, log_p = comparisons[t].log_q[view], comparisons[t].log_p[view]
        for row, (name, log_density) in enumerate((("true", log_q), ("learned", log_p))):
            axes = figure.add_subplot(panels[row, column])
            _show_density(axes, log_density, largest=log_q.max())
            if not column:
                axes.set_ylabel(name)
            if not row:
                axes.set_title(f"level {t}", fontsize="medium")
        axes = figure.add_subplot(panels[2, column])
        x, y = samples[t].T
        axes.plot(x, y, ".", color=SAMPLE_COLOUR, markersize=1.5, markeredgewidth=0, alpha=0.6)
        _format_plane(axes)
        axes.set_xlabel(f"KL {abs(comparisons[t].kl):.4f}", fontsize="medium")
        if not column:
            axes.set_ylabel("samples")
    axes = figure.add_subplot(panels[:, columns:])
    _show_density(axes, comparisons[0].log_p[view], largest=comparisons[0].log_q[view].max())
    positions = np.stack([samples[t] for t in sorted(samples, reverse=True)])
    opacity = np.linspace(0.15, 1, len(positions) - 1)  # increases towards the data
    for points, colour in zip(positions.swapaxes(0, 1), PATH_COLOURS, strict=False):
        for start, end, alpha in zip(points[:-1], points[1:], opacity, strict=True):
            x, y = np.stack([start, end], axis=1)
            axes.plot(x, y, color=colour, linewidth=1.2, alpha=alpha, solid_capstyle="round")
        axes.plot(*points[:1].T, "o", markersize=7, color="none", markeredgecolor=colour)
        axes.plot(*points[-1:].T, "o", markersize=8, color=colour, markeredgecolor="white")
    axes.set_title("paths from white noise (circles) to samples (dots)", fontsize="medium")
    _write(path, figure)


def write_composition(
    path: epath.Path,
    densities: Mapping[str, Float[np.ndarray, "side side"]],
    samples: Float[np.ndarray, "n 2"],
    grid: Grid,
) -> None:
    """Writes a figure of densities in the plane, and of samples of the last one.

    Args:
      path: path of the PNG file.
      densities: log-densities at the nodes, by title [nats].
      samples: their positions.
      grid: grid of the densities.

    Raises:
      UserError: if the file cannot be written.
    """
    from matplotlib.figure import Figure  # takes half a second, and most tasks draw no figure

    side, columns = 1.5 * SIZE, 1 + len(densities)
    figure = Figure(figsize=(side * columns, 1.1 * side), layout="constrained")
    visible = np.abs(grid.axis) <= HALF_WIDTH
    for column, (title, log_density) in enumerate(densities.items(), 1):
        axes = figure.add_subplot(1, columns, column)
        _show_density(axes, log_density[np.ix_(visible, visible)], largest=log_density.max())
        axes.set_title(title, fontsize="medium")
    axes = figure.add_subplot(1, columns, columns)
    axes.plot(*samples.T, "o", color=SAMPLE_COLOUR, markersize=2, markeredgewidth=0, alpha=0.5)
    _format_plane(axes)
    axes.set_title(f"{len(samples):,} samples", fontsize="medium")
    _write(path, figure)


def write_rows(path: epath.Path, rows: Mapping[str, UInt8[np.ndarray, "h w C"]]) -> None:
    """Writes a figure of pictures below each other, each with its title.

    Args:
      path: path of the PNG file.
      rows: grey (C = 1) or RGB (C = 3) pictures of equal width, by title.

    Raises:
      UserError: if the file cannot be written.
    """
    from matplotlib.figure import Figure  # takes half a second, and most tasks draw no figure

    heights = [len(picture) / picture.shape[1] for picture in rows.values()]
    size = 2 * WIDTH, 2 * WIDTH * sum(heights) + 0.3 * len(rows)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(rows), squeeze=False, height_ratios=heights)
    for (title, picture), (axes,) in zip(rows.items(), grid, strict=True):
        axes.imshow(picture, cmap="gray", vmin=0, vmax=255)
        axes.set_title(title, fontsize="medium")
        axes.set_axis_off()
    _write(path, figure)


def _show_density(axes: Any, log_density: Float[np.ndarray, "h w"], largest: float) -> None:
    """Shows a log-density as an image; the first coordinate increases to the right.

    Args:
      axes: Matplotlib axes.
      log_density: log-density at the nodes of a grid; the first axis is the first coordinate
        [nats].
      largest: upper end of the colour scale; the lower end is `largest` - `DEPTH` [nats].
    """
    axes.imshow(
        log_density.T,
        origin="lower",
        extent=2 * (-HALF_WIDTH, HALF_WIDTH),
        vmin=largest - DEPTH,
        vmax=largest,
        cmap="magma",
        interpolation="bilinear",
    )
    _format_plane(axes)


def _format_plane(axes: Any) -> None:
    """Sets equal limits and scales for both axes, and hides ticks and frame."""
    limits = (-HALF_WIDTH, HALF_WIDTH)
    axes.set(xlim=limits, ylim=limits, aspect="equal", xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


class Histograms(NamedTuple):
    """A row of panels, each with overlaid histograms of several sets of values.

    Attributes:
      title: title of the row.
      panels: titles of the panels.
      values: for each panel, the values of each set.
      notes: for each panel, a short text per set except the first, printed above the panel.
    """

    title: str
    panels: Sequence[str]
    values: Sequence[Sequence[Float[np.ndarray, "n"]]]
    notes: Sequence[Sequence[str]]


def write_histograms(
    path: epath.Path, sets: Sequence[str], rows: Sequence[Histograms], notes: str
) -> None:
    """Writes a figure of rows of histograms.

    Args:
      path: path of the PNG file.
      sets: names of the sets, the same in all panels. The first is drawn as a filled area, the
        others as lines.
      rows: rows with equal numbers of panels.
      notes: what the notes above the panels mean, for the legend. Each note has the colour of
        its set.

    Raises:
      UserError: if the file cannot be written.
    """
    # Takes half a second, and most tasks draw no figure.
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import EngFormatter, MaxNLocator

    columns, others = len(rows[0].panels), len(sets) - 1
    size = HISTOGRAM_WIDTH * max(columns, 3), HISTOGRAM_HEIGHT * len(rows) + 0.5
    figure = Figure(figsize=size, layout="constrained")
    colours = ["0.7", *mpl.colormaps["plasma"](np.linspace(0.1, 0.75, others))]
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for row, row_of_axes in zip(rows, grid, strict=True):
        row_of_axes[0].set_ylabel(row.title)
        for axes, title, values, texts in zip(
            row_of_axes, row.panels, row.values, row.notes, strict=True
        ):
            limits = tuple(np.percentile(np.concatenate(values), PERCENTILES))
            for i, x in enumerate(values):
                style = {"color": colours[i], "histtype": "step" if i else "stepfilled"}
                weights = np.full(len(x), 1 / len(x))  # the sets may differ in size
                axes.hist(x, BINS, range=limits, weights=weights, linewidth=1.5, **style)
            for i, text in enumerate(texts):
                style = {"color": colours[i + 1], "ha": "center", "fontsize": "small"}
                position = (i + 0.5) / others, 1.02  # relative to the panel's size
                axes.text(*position, text, transform=axes.transAxes, **style)
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
    # Without Matplotlib's version, equal figures are equal files.
    figure.savefig(encoded, format="png", metadata={"Software": None})
    write_atomically(path, encoded.getvalue())
