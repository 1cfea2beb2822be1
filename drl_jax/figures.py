"""Curves against steps, and histograms, as PNGs."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Panels beside each other, and the size of one [inches].
COLUMNS = 3
WIDTH, HEIGHT = 4.0, 3.0

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
    path.write_bytes(encoded.getvalue())
