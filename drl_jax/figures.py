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
    """A row of axes, each with the histograms of several sets of numbers, laid over each other.

    Attributes:
      title: what the numbers are.
      panels: title of each of the axes.
      values: the numbers, of each panel and in it of each set.
      notes: a few characters for each of these, written above in the set's colour.
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
      sets: their names, the same in all panels. The first is drawn as an area, others as lines.
      rows: of panels, equally many in each.
      notes: what the notes are.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import EngFormatter, MaxNLocator

    columns = len(rows[0].panels)
    figure = Figure(figsize=(NARROW * columns, LOW * len(rows) + 0.5), layout="constrained")
    colours = ["0.7", *mpl.colormaps["plasma"](np.linspace(0.1, 0.75, len(sets) - 1))]
    all_axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, line in zip(rows, all_axes, strict=True):
        line[0].set_ylabel(row.title)
        for axes, title, values, marks in zip(
            line, row.panels, row.values, row.notes, strict=True
        ):
            ends = np.percentile(np.concatenate(values), [0.1, 99.9])
            bins = np.linspace(*ends, BINS + 1)
            for i, (x, colour) in enumerate(zip(values, colours, strict=True)):
                kind = "step" if i else "stepfilled"
                axes.hist(x, bins, density=True, histtype=kind, color=colour, linewidth=1.5)
            for i, (mark, colour) in enumerate(zip(marks[1:], colours[1:], strict=True)):
                at = (i + 0.5) / (len(sets) - 1)
                axes.text(
                    *(at, 1.02, mark),
                    color=colour,
                    ha="center",
                    fontsize="small",
                    transform=axes.transAxes,
                )
            axes.set_title(title, pad=18)
            axes.set_yticks([])
            axes.spines[["left", "right", "top"]].set_visible(False)
            axes.xaxis.set_major_locator(MaxNLocator(3))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    patches = [Patch(color=c, label=name) for name, c in zip(sets, colours, strict=True)]
    patches.append(Patch(alpha=0, label=notes))
    figure.legend(handles=patches, loc="outside upper center", ncols=len(patches))
    _write(path, figure)


def _write(path: epath.Path, figure: "Figure") -> None:
    """Writes a figure as PNG."""
    encoded = io.BytesIO()
    # Without the library's version in it, equal numbers are equal files.
    figure.savefig(encoded, format="png", metadata={"Software": None})
    path.write_bytes(encoded.getvalue())
